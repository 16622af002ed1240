"""Statistics of a model over unlabelled batches: one pass, float64, additive.

For each norm, over the samples s with channel means z̄_s (means over space; for a norm that works
position by position, each position is a sample):

    count = Σ 1      total = Σ z̄_s      second = Σ z̄_s z̄_sᵀ within each group

All three are sums, so batches stream, and under `torch.distributed` the ranks' sums are added:
every rank ends with the numbers of the whole data, up to float64 rounding. A fifth of the samples
is kept out of the fit, to measure what it gave: which ones follows from the number of their batch,
where batch n of rank r of w is the batch r + n w of the data, as if one process had read them all.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rewrite.compare import tensors
from rewrite.errors import OptionError
from rewrite.inputs import Inputs, batches_for, device_of, dtype_of
from rewrite.tree import Tree

HOLD_OUT = 5
"""One sample of so many is kept out of the fit."""

_MOST_HELD = 64
"""Samples that are held out of batches of one size: they stay in memory until the end."""


@dataclass
class MeanStatistics:
    """Sums over samples of one norm's channel means, by group."""

    groups: int
    count: Tensor
    total: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, channels: int, groups: int) -> MeanStatistics:
        """Return the sums over no sample."""
        size = channels // groups
        return cls(
            groups,
            torch.zeros((), dtype=torch.float64),
            torch.zeros(groups, size, dtype=torch.float64),
            torch.zeros(groups, size, size, dtype=torch.float64),
        )

    def add(self, means: Tensor) -> None:
        """Add samples: `means` is (samples, channels)."""
        samples = means.detach().double().cpu().reshape(len(means), self.groups, -1)
        samples = samples[torch.isfinite(samples).all(2).all(1)]
        self.count += len(samples)
        self.total += samples.sum(0)
        self.second += torch.einsum("sgi,sgj->gij", samples, samples)

    def grouped(self, order: Tensor, groups: int) -> MeanStatistics:
        """Return the same sums with the channels in another order, in groups of consecutive ones.

        Only sums within a group of channels are there to be taken: all of them where that is one.
        """
        total = self.total.flatten()[order].reshape(groups, -1)
        if self.groups == groups == len(order):
            return MeanStatistics(groups, self.count, total, self.second[order])
        assert self.groups == 1
        rows = order.reshape(groups, -1)
        second = self.second[0][rows[:, :, None], rows[:, None, :]]
        return MeanStatistics(groups, self.count, total, second)

    def mapped(self, matrix: Tensor) -> MeanStatistics:
        """Return the sums over the samples, each multiplied by `matrix`, channel by channel."""
        total = (matrix @ self.total.flatten())[:, None]
        second = torch.full((len(total), 1, 1), float("nan"), dtype=torch.float64)
        return MeanStatistics(len(total), self.count, total, second)

    def reduce(self) -> None:
        """Add the sums of all ranks, if this process is one of several."""
        for tensor in (self.count, self.total, self.second):
            all_reduce(tensor)

    @property
    def mean(self) -> Tensor:
        """The mean over samples, (groups, size)."""
        return self.total / self.count.clamp(min=1)

    @property
    def covariance(self) -> Tensor:
        """The covariance over samples within each group, (groups, size, size)."""
        mean = self.mean
        second = self.second / self.count.clamp(min=1)
        return second - mean[:, :, None] * mean[:, None, :]


def rank_and_world() -> tuple[int, int]:
    """Return which of how many processes this is."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def all_gather(items: Sequence[str]) -> tuple[str, ...]:
    """Return the items of all ranks."""
    _, world = rank_and_world()
    if world == 1:
        return tuple(items)
    gathered: list[Sequence[str]] = [()] * world
    distributed.all_gather_object(gathered, list(items))
    return tuple(item for part in gathered for item in part)


def all_reduce(tensor: Tensor) -> None:
    """Add `tensor` over all ranks, in place; do nothing in a single process."""
    if rank_and_world()[1] == 1:
        return
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    moved = tensor.to(device)
    distributed.all_reduce(moved)
    tensor.copy_(moved)


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


@contextlib.contextmanager
def hooked(
    modules: Sequence[nn.Module], hook: Callable[[int, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `hook(index, input, output)` at each call of `modules`; what it returns goes on."""

    def hook_for(index: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda module, args, output: hook(index, args[0], output)

    handles = [
        module.register_forward_hook(hook_for(index), prepend=True)
        for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode and every module back into its own mode afterwards."""
    modes = {module: module.training for _, module in Tree(model).modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on one batch.

    Raises:
        OptionError: the model rejects it.
    """
    try:
        return model(*inputs.args, **inputs.kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        message = str(error).splitlines()[0]
        raise OptionError(
            f"calibration data ({inputs}): the model rejects it: {message}"
        ) from error


def variations(inputs: Inputs) -> Iterator[Inputs]:
    """Yield two variations of a batch of images; none of anything else.

    In the first, colours change places, brightness and contrast change, some are mirrored top to
    bottom, some are negatives. In the second, each is half one sample of the first, half another.
    What happens to a batch depends on that batch alone, so that ranks agree with one process.
    """
    if len(inputs.args) != 1 or inputs.kwargs or not _is_image_batch(inputs.args[0]):
        return
    images: Tensor = inputs.args[0]
    values = images.detach().float().cpu().contiguous().numpy()
    generator = torch.Generator().manual_seed(zlib.crc32(values.tobytes()))
    recoloured = torch.stack([_recoloured(image, generator) for image in images])
    yield Inputs((recoloured,))
    other = recoloured[torch.randperm(len(images), generator=generator).to(images.device)]
    half = images.shape[3] // 2
    yield Inputs((torch.cat([recoloured[..., :half], other[..., half:]], dim=3),))


def _is_image_batch(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 4:
        return False
    return value.shape[1] in (1, 3) and min(value.shape[2:]) >= 4


def _recoloured(image: Tensor, generator: torch.Generator) -> Tensor:
    kind = int(torch.randint(4, (), generator=generator))
    order = torch.randperm(len(image), generator=generator).to(image.device)
    if kind == 0:
        image = image.flip(1)
    elif kind in (1, 2):
        image = image[order]
    contrast = 0.5 + float(torch.rand((), generator=generator))
    colour = 0.3 * torch.randn(len(image), 1, 1, generator=generator)
    changed = image * contrast + colour.to(image)
    return -changed if kind == 3 else changed
