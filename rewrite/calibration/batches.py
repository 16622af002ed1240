"""Batches of a user's data as inputs of a model: checked, held out, fed in one pass.

A fifth of the samples is kept out of the fit, to measure what it gave: which ones follows from the
number of their batch, where batch n of rank r of w is the batch r + n w of the data, as if one
process had read them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.distributed import all_reduce, rank_and_world
from rewrite.errors import OptionError
from rewrite.runtime.inputs import Inputs, batches_for, device_of, dtype_of
from rewrite.runtime.leaves import tensors

HOLD_OUT = 5
"""One sample of so many is kept out of the fit."""


_MOST_HELD = 64
"""Samples that are held out of batches of one size: they stay in memory until the end."""


@dataclass
class Batches:
    """Batches of calibration data, checked, split into what is fitted and what is held out.

    Attributes:
        hold_out: one sample of so many is kept out; 0 for none.
        seen: samples read so far.
        left_out: what was wrong with the batches that were not used.
        held: the samples kept out of the fit, batch by batch.
    """

    model: nn.Module
    source: Iterable[Any]
    hold_out: int = HOLD_OUT
    seen: int = 0
    left_out: list[str] = field(default_factory=list)
    held: list[Inputs] = field(default_factory=list)

    def __iter__(self) -> Iterator[Inputs]:
        """Yield what the model is fitted on.

        Raises:
            OptionError: no rank has a batch that can be used.
        """
        used = torch.zeros(())
        rank, world = rank_and_world()
        for place, batch in enumerate(self.source):
            number = rank + place * world
            inputs = prepared(self.model, batch)
            if reason := _unusable(inputs):
                self.left_out.append(f"batch {number}: {reason}")
                continue
            fitted = self._split(inputs, number)
            if fitted is not None:
                used += 1
                yield fitted
        self.left_out.extend(getattr(self.source, "left_out", ()))
        all_reduce(used)
        if not used:
            reasons = f" ({'; '.join(self.left_out[:3])})" if self.left_out else ""
            raise OptionError(f"calibration data: no batch to fit to{reasons}")

    def _split(self, inputs: Inputs, number: int) -> Inputs | None:
        """Return the samples of a batch to fit to; keep the others."""
        size = batch_size(inputs)
        self.seen += size
        if not self.hold_out:
            return inputs
        position = torch.arange(number * size, (number + 1) * size)
        held = position % self.hold_out == self.hold_out - 1
        held &= position < self.hold_out * _MOST_HELD
        if held.any():
            self.held.append(rows(inputs, held))
        return None if held.all() else rows(inputs, ~held)


def prepared(model: nn.Module, batch: Any) -> Inputs:
    """Return a batch as inputs of the model: without labels, on its device, in its dtype."""
    device, dtype = device_of(model), dtype_of(model)
    return (
        batches_for(model, batch)
        .to(device)
        .map(
            lambda leaf: (
                leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            )
        )
    )


def first_batch(calibration: Iterable[Any] | None, wants: str) -> Any:
    """Return the first batch of a user's data, as it is.

    Args:
        calibration: the data; None for none.
        wants: the pass and the option that need it, for the message.

    Raises:
        OptionError: there is no batch.
    """
    for batch in calibration or ():
        return batch
    raise OptionError(f"{wants} needs a batch; pass calibration data")


def first_usable(model: nn.Module, source: Iterable[Any]) -> Inputs | None:
    """Return the first batch that a model could be fitted to, or None."""
    batches = (prepared(model, batch) for batch in source)
    return next((inputs for inputs in batches if not _unusable(inputs)), None)


def batch_size(inputs: Inputs) -> int:
    """Return the number of samples in a batch."""
    first = next(iter(tensors([inputs.args, dict(inputs.kwargs)])), None)
    return 0 if first is None or first.dim() == 0 else len(first)


def rows(inputs: Inputs, mask: Tensor) -> Inputs:
    """Return the samples of a batch where `mask` is true."""
    size = len(mask)
    return inputs.map(
        lambda leaf: (
            leaf[mask.to(leaf.device)]
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
            else leaf
        )
    )


def _unusable(inputs: Inputs) -> str:
    """Return why a batch cannot be fitted to, or ""."""
    leaves = tensors([inputs.args, dict(inputs.kwargs)])
    if not leaves:
        return "holds no tensor"
    if batch_size(inputs) == 0:
        return "is empty"
    if any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in leaves):
        return "holds NaN or infinity"
    return ""
