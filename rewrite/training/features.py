"""Match the channels of a student's norms to those of its teacher, and collect their outputs.

    S[c, d] = 2 cov(s_c, t_d) / (var s_c + var t_d + (mean s_c − mean t_d)²)

is the concordance of channel c of the student's norm with channel d of the teacher's over samples
and positions (Lin 1989, https://doi.org/10.2307/2532051): 1 if and only if both are equal. A plain
swap keeps the order of channels. A swap that fits to data may permute the channels of a residual
stream or change its basis; then a channel has its partner elsewhere, or has none:

    Σ S[c, c] ≥ 0.7 Σ max_d S[c, d]       the order is kept
    S[c, d] ≥ ½, largest of its row and   channel c matches channel d, if at least half of the
    of its column                         channels have such a partner
    else                                  the norm has no features in common with the teacher's
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.outcomes import Declined
from rewrite.runtime.inputs import device_of, dtype_of
from rewrite.runtime.modes import evaluating
from rewrite.runtime.tree import Tree
from rewrite.text.some import some
from rewrite.training.samples import Samples

_STAYS, _CLEAR, _HALF = 0.7, 0.5, 0.5
_SAMPLES, _CHUNK, _POSITIONS = 64, 8, 64
"""Samples that are compared, at a time, and how many positions of each."""


@dataclass(frozen=True)
class Pair:
    """A norm of the student, and the module of the same name in the teacher.

    Attributes:
        name: the qualified name of both.
        own, other: the student's module and the teacher's.
        channels: two int64 tensors of equal length, the matching channels of the student and of
            the teacher; None if the order is kept.
        variance: the variance of all values of the teacher's output.
    """

    name: str
    own: nn.Module
    other: nn.Module
    channels: tuple[Tensor, Tensor] | None = None
    variance: float | None = None

    def select(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matching channels of two outputs (N, C, *), in the same order."""
        if self.channels is None:
            return own, other
        mine, theirs = (numbers.to(own.device) for numbers in self.channels)
        return own.index_select(1, mine), other.index_select(1, theirs)


def swapped_norms(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Return the pairs where the teacher has a BatchNorm and the student another module."""
    own, kind = Tree(student), nn.modules.batchnorm._BatchNorm
    return [
        Pair(name, own.names[name], module)
        for name, module in Tree(teacher).modules()
        if isinstance(module, kind) and not isinstance(own.names.get(name, module), kind)
    ]


def aligned(
    pairs: Sequence[Pair], student: nn.Module, teacher: nn.Module, samples: Samples
) -> tuple[list[Pair], list[str]]:
    """Return the pairs whose channels could be matched, and a note on each of the others.

    Args:
        pairs: norms of both models.
        student: the converted model, before any training.
        teacher: the original, in eval mode.
        samples: the inputs that both are run on; the first 64 are used.
    """
    sums = {pair.name: _Concordance() for pair in pairs}
    numbers = torch.arange(min(_SAMPLES, len(samples)))
    with evaluating(student, teacher), torch.no_grad():
        for index in numbers.split(_CHUNK):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            batch = samples.take(index)
            _, own = run_noted(student, batch, [pair.own for pair in pairs])
            _, other = run_noted(teacher, batch, [pair.other for pair in pairs])
            for pair, mine, theirs in zip(pairs, own, other, strict=True):
                sums[pair.name].add(mine, theirs)
    kept: list[Pair] = []
    left: dict[str, list[str]] = {}
    for pair in pairs:
        found = sums[pair.name]
        channels = found.channels()
        if isinstance(channels, Declined):
            left.setdefault(channels.reason, []).append(pair.name)
        else:
            kept.append(replace(pair, channels=channels, variance=found.variance()))
    notes = [f"features: {reason} at {some(names)}: not matched" for reason, names in left.items()]
    if moved := [pair.name for pair in kept if pair.channels is not None]:
        notes.insert(0, f"features: channels in another order at {some(moved)}: matched by it")
    return kept, notes


def run_noted(
    model: nn.Module, batch: Samples, watched: Sequence[nn.Module]
) -> tuple[Any, list[list[Tensor]]]:
    """Run a model; return its output, and the outputs of each watched module, call by call.

    The inputs are put on the model's device and cast to its dtype.
    """
    inputs = batch.to(device_of(model), dtype_of(model)).inputs
    with _outputs(watched) as noted:
        output = model(*inputs.args, **inputs.kwargs)
    return output, noted


@contextlib.contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Collect the outputs of each module, as they are before anything writes into them."""
    noted: list[list[Tensor]] = [[] for _ in modules]

    def note(number: int, output: Tensor) -> None:
        noted[number].append(output.clone())

    handles = [
        module.register_forward_hook(lambda _, __, output, number=number: note(number, output))
        for number, module in enumerate(modules)
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Concordance:
    """Sums over samples and positions of two norms' outputs, in float64."""

    count: int = 0
    differ: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, own: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Add the outputs of as many calls of both."""
        if [t.shape for t in own] != [t.shape for t in other]:
            self.differ = True
            return
        for mine, theirs in zip(own, other, strict=True):
            s, t = _values(mine), _values(theirs)
            parts = {"s": s.sum(1), "t": t.sum(1), "ss": (s * s).sum(1), "tt": (t * t).sum(1),
                     "st": s @ t.T}  # fmt: skip
            self.sums = {key: self.sums.get(key, 0) + part for key, part in parts.items()}
            self.count += s.shape[1]

    def matrix(self) -> Tensor:
        """Return S, (C, C); rows and columns of channels that do not vary are zero."""
        s, t, ss, tt, st = (self.sums[key] / self.count for key in ("s", "t", "ss", "tt", "st"))
        covariance = st - s[:, None] * t
        own, other = (ss - s * s).clamp_min(0), (tt - t * t).clamp_min(0)
        distance = own[:, None] + other + (s[:, None] - t).square()
        still = (own[:, None] <= 1e-10 * ss[:, None]) | (other <= 1e-10 * tt)
        return torch.where(still, 0.0, 2 * covariance / distance.clamp_min(1e-300))

    def variance(self) -> float:
        """Return the variance of all values of the teacher's outputs."""
        t, tt = self.sums["t"] / self.count, self.sums["tt"] / self.count
        return float(tt.mean() - t.mean().square())

    def channels(self) -> tuple[Tensor, Tensor] | Declined | None:
        """Return the matching channels, None if the order is kept, or why there are too few."""
        if self.differ:
            return Declined("other shapes than the teacher's")
        matrix = self.matrix() if self.count else torch.zeros(1, 1)
        best, partner = matrix.max(1)
        if float(best.sum()) <= 0:
            return Declined("no channel that varies")
        if float(matrix.diagonal().sum()) >= _STAYS * float(best.sum()):
            return None
        numbers = torch.arange(len(matrix))
        mutual = (matrix.max(0).indices[partner] == numbers) & (best >= _CLEAR)
        if int(mutual.sum()) < _HALF * int((best > 0).sum()):
            return Declined("channels that are none of the teacher's (another basis)")
        return numbers[mutual], partner[mutual]


def _values(output: Tensor) -> Tensor:
    """Return an output (N, C, *) as (C, values); of large maps a sample of the positions."""
    flat = output.detach().flatten(2) if output.dim() > 2 else output.detach()[:, :, None]
    flat = flat[:, :, :: max(1, flat.shape[2] // _POSITIONS)]
    return flat.transpose(0, 1).flatten(1).double().cpu()
