"""Training data in memory: read once, split into training and held-out samples, shuffled by a seed.

    held out   sample number n with n mod 5 = 4, at most 512; of fewer than five samples the last
    a step     the next b k w samples of the epoch's permutation, for micro-batches of b samples, k
               micro-batches per step and w workers; worker r takes numbers r, r + w, r + 2 w …

So w workers with batches of b read in each step what one worker with batches of w b reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_structure
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rewrite.errors import OptionError
from rewrite.runtime.inputs import Inputs, batches_for
from rewrite.runtime.leaves import tensors

STREAMED = 4096
"""How many samples end the reading of batches that come one by one.

A tensor and a sequence of batches (a list, a tuple) are in memory already and are read whole.
"""

_HOLD_OUT, _MOST_HELD = 5, 512
_READ_AT_ONCE = 64


@dataclass(frozen=True)
class Samples:
    """Inputs of a model, stacked along axis 0, and their labels or None.

    Labels have one number a sample, (N,), or one a position, (N, *).
    """

    inputs: Inputs
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(tensors([self.inputs.args, dict(self.inputs.kwargs)])[0])

    def take(self, index: Tensor) -> Samples:
        """Return the samples with the given numbers, an int64 tensor."""
        chosen = self.inputs.map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf)
        return Samples(chosen, None if self.labels is None else self.labels[index])

    def to(self, device: torch.device, dtype: torch.dtype) -> Samples:
        """Return the samples on a device, floating-point inputs cast to `dtype`."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.is_floating_point() else None)

        labels = None if self.labels is None else self.labels.to(device)
        return Samples(self.inputs.map(moved), labels)


def read_samples(model: nn.Module, source: Iterable[Any], labels: bool) -> Samples:
    """Read batches: tensors, tuples of positional inputs, or dicts of keyword inputs.

    Args:
        model: the model; values beyond the parameters of its forward are dropped, and the key
            "labels" of a dict.
        source: the batches, or a map-style dataset of samples. A tensor and a sequence (a list, a
            tuple) are read whole, everything else up to the batch with which 4096 samples are read.
        labels: whether a tuple ends in labels, or a dict has the key "labels".

    Raises:
        OptionError: there are fewer than two samples, their shapes differ, or labels are missing.
    """
    if isinstance(source, Tensor):
        source = [source]
    elif isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        source = DataLoader(source, _READ_AT_ONCE)
    elif not isinstance(source, Iterable):
        raise OptionError(f"training data: {type(source).__name__}; pass batches")
    streamed = not isinstance(source, Sequence)
    parts: list[Samples] = []
    count = 0
    for number, batch in enumerate(source):
        part = _part(model, batch, labels, number)
        parts.append(part)
        _check_alike(parts[0], part, number)
        count += len(part)
        if streamed and count >= STREAMED:
            break
    if count < 2:
        raise OptionError(f"training data: {count} sample; one is held out, so pass 2 or more")
    joined = tree_map(_joined, *([part.inputs.args, dict(part.inputs.kwargs)] for part in parts))
    known = [part.labels for part in parts if part.labels is not None]
    return Samples(Inputs(joined[0], joined[1]), torch.cat(known) if known else None)


def _part(model: nn.Module, batch: Any, labels: bool, number: int) -> Samples:
    targets = None
    if isinstance(batch, Mapping) and "labels" in batch:
        targets = batch["labels"] if labels else None
        batch = {key: value for key, value in batch.items() if key != "labels"}
    elif labels and isinstance(batch, tuple | list) and len(batch) > 1:
        *batch, targets = batch
    elif labels:
        raise OptionError(f"training data: batch {number} has no labels beside its inputs")
    inputs = batches_for(model, batch)
    leaves = tensors([inputs.args, dict(inputs.kwargs)])
    if not leaves or leaves[0].dim() == 0:
        raise OptionError(f"training data: batch {number} holds no tensor of samples")
    if any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in leaves):
        raise OptionError(f"training data: batch {number} holds NaN or infinity")
    if targets is not None:
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"training data: labels of batch {number}: {error}") from error
        count = len(targets) if targets.dim() else 1
        if count != len(leaves[0]) or not targets.dim():
            raise OptionError(
                f"training data: batch {number} has {len(leaves[0])} samples, {count} labels"
            )
    return Samples(inputs, targets)


def _check_alike(first: Samples, part: Samples, number: int) -> None:
    """Raise OptionError unless the samples of a batch can be stacked on those of the first."""

    def shape(one: Samples) -> Any:
        values = [one.inputs.args, dict(one.inputs.kwargs), one.labels]
        kinds = [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in tensors(values)]
        return tree_structure(values), kinds

    if shape(part) != shape(first):
        raise OptionError(
            f"training data: batch {number} ({part.inputs}) differs from batch 0 ({first.inputs}) "
            "in more than its number of samples"
        )


def _joined(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Return the training samples and the held-out samples."""
    numbers = torch.arange(len(samples))
    held = (numbers % _HOLD_OUT == _HOLD_OUT - 1) & (numbers < _HOLD_OUT * _MOST_HELD)
    if not held.any():
        held[-1] = True
    return samples.take(numbers[~held]), samples.take(numbers[held])


def steps_of(
    samples: Samples,
    epoch: int,
    seed: int,
    batch_size: int,
    accumulate: int,
    place: tuple[int, int],
) -> Iterator[tuple[int, list[Samples]]]:
    """Yield, step by step, the size of the global batch and this worker's micro-batches.

    Args:
        samples: the training samples.
        epoch: the number of the epoch, from 0.
        seed: with `epoch` it determines the permutation.
        batch_size: samples per micro-batch.
        accumulate: micro-batches per step.
        place: the rank of this worker, and the number of workers.
    """
    rank, world = place
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(samples), generator=generator)
    for chosen in order.split(batch_size * accumulate * world):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if len(chosen) >= world:
            own = chosen[rank::world]
            yield len(chosen), [samples.take(part) for part in own.split(batch_size)]


def step_count(samples: Samples, batch_size: int, accumulate: int, world: int) -> int:
    """Return the number of steps of an epoch."""
    whole, rest = divmod(len(samples), batch_size * accumulate * world)
    return whole + (rest >= world)
