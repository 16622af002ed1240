"""How a converted model agrees with the original on samples that no fit has seen.

    per norm    correlation of old and new output; error = ‖new − old‖ / ‖old − mean(old)‖
    the model   share of samples with the same largest output, cosine, and the same error

All are ratios of sums, added over batches and, under `torch.distributed`, over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rewrite.calibration.batches import Batches, batch_size, rows
from rewrite.distributed import all_gather, all_reduce
from rewrite.grouping.swapped_norm import SwappedNorm
from rewrite.runtime.hooks import hooked, run
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.leaves import tensors

POOR = 0.9
"""Agreement below which the report says that the model is not what it was."""


_CHUNK = 8


@dataclass(frozen=True)
class Agreement:
    """How two models agree on held-out samples.

    Attributes:
        samples: how many there were.
        top1: share of samples with the same largest output; None if the output has no classes.
        cosine, error: of the outputs.
        layers: correlation and error of each norm's output.
        left_out: calibration batches that were not used, and why.
    """

    samples: int
    top1: float | None = None
    cosine: float = float("nan")
    error: float = float("nan")
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def sentences(self) -> tuple[str, ...]:
        """Return what to tell the user."""
        lines = [f"calibration {reason}, left out" for reason in self.left_out]
        if self.samples == 0:
            return (*lines, "too few calibration samples to hold any out: agreement not measured")
        same = "" if self.top1 is None else f"same top-1 on {self.top1:.1%}, "
        lines.append(
            f"on {self.samples} held-out calibration samples: {same}cosine {self.cosine:.4f}, "
            f"relative error {self.error:.3f}"
        )
        poor = self.cosine < POOR if self.top1 is None else self.top1 < POOR
        if poor:
            worst = sorted(self.layers, key=lambda name: -self.layers[name]["error_added"])[:3]
            lines.append(
                "the converted model does not agree well with the original; most is lost at "
                f"{', '.join(worst)}; pass fewer groups, or mix to bn-to-gn, or train it back with "
                "`rewrite recover`"
            )
        return tuple(lines)


@dataclass
class Sums:
    """Sums over values of an old and a new tensor."""

    values: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))

    def add(self, old: Tensor, new: Tensor) -> None:
        """Add two tensors of one shape."""
        a, b = old.detach().double(), new.detach().double()
        sums = [a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]
        numbers = [float(a.numel()), *(float(s) for s in sums)]
        self.values += torch.tensor(numbers, dtype=torch.float64)

    @property
    def metrics(self) -> dict[str, float]:
        """The correlation and the relative error."""
        n, a, b, aa, bb, ab = (float(v) for v in self.values)
        if n == 0:
            return {"correlation": float("nan"), "error": float("nan")}
        var_a, var_b = aa - a * a / n, bb - b * b / n
        tiny = 1e-300
        return {
            "correlation": (ab - a * b / n) / max(var_a * var_b, tiny) ** 0.5,
            "error": (max(aa + bb - 2 * ab, 0.0) / max(var_a, tiny)) ** 0.5,
        }

    @property
    def cosine(self) -> float:
        """The cosine of the angle between old and new."""
        _, _, _, aa, bb, ab = (float(v) for v in self.values)
        return float(ab / max(aa * bb, 1e-300) ** 0.5)


def measure(model: nn.Module, probes: Sequence[SwappedNorm], batches: Batches) -> Agreement:
    """Run the held-out samples through the original and the converted model, norm by norm."""
    layers = [Sums() for _ in probes]
    whole = Sums()
    same = torch.zeros(2, dtype=torch.float64)
    samples = torch.zeros((), dtype=torch.float64)
    modules = [probe.module for probe in probes]
    for batch, size in _chunks(batches.held):
        olds: list[list[Tensor]] = [[] for _ in probes]

        def replaced(
            index: int, z: Tensor, output: Tensor, olds: list[list[Tensor]] = olds
        ) -> Tensor:
            if not probes[index].standardized:
                return output
            old = probes[index].old(z)
            olds[index].append(old.clone())  # An activation may work in place on what goes on.
            return old

        def compared(
            index: int, z: Tensor, output: Tensor, olds: list[list[Tensor]] = olds
        ) -> None:
            if olds[index]:
                layers[index].add(olds[index].pop(0), output)

        with hooked(modules, replaced):
            before = tensors(run(model, batch))
        with hooked(modules, compared):
            after = tensors(run(model, batch))
        samples += size
        for old, new in zip(before, after, strict=False):
            whole.add(old, new)
        if before and before[0].dim() == 2 and before[0].shape[1] > 1:
            same += torch.tensor(
                [float((before[0].argmax(1) == after[0].argmax(1)).sum()), float(len(before[0]))],
                dtype=torch.float64,
            )
    for item in (*layers, whole):
        all_reduce(item.values)
    all_reduce(same)
    all_reduce(samples)
    left_out = all_gather(batches.left_out)
    if int(samples) == 0:
        return Agreement(0, left_out=left_out)
    top1 = float(same[0] / same[1]) if same[1] > 0 else None
    named = _by_name(probes, layers)
    error = whole.metrics["error"]
    return Agreement(int(samples), top1, whole.cosine, error, named, left_out)


def _by_name(probes: Sequence[SwappedNorm], layers: Sequence[Sums]) -> dict[str, dict[str, float]]:
    """Return each norm's metrics, with what it added to the error of the norm before it."""
    named: dict[str, dict[str, float]] = {}
    before = 0.0
    for probe, sums in zip(probes, layers, strict=True):
        if float(sums.values[0]) == 0:
            continue
        metrics = sums.metrics
        named[probe.target] = {**metrics, "error_added": metrics["error"] - before}
        before = metrics["error"]
    return named


def _chunks(held: Sequence[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """Yield the held-out samples a few at a time."""
    for inputs in held:
        size = batch_size(inputs)
        for start in range(0, size, _CHUNK):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[start : start + _CHUNK] = True
            yield rows(inputs, mask), int(mask.sum())
