"""Mean and standard deviation of each unit's pre-activation, over the batch and space.

A unit that is constant over the batch has no scale: it is marked as not usable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rewrite.weights.units import unit_axis

# Below this multiple of its mean a deviation is rounding of the forward, not signal.
_RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Units:
    """Mean and standard deviation of each unit of an output; `usable` where there is a scale."""

    mean: torch.Tensor
    std: torch.Tensor
    usable: torch.Tensor
    samples: int

    @property
    def warning(self) -> str | None:
        """What is wrong with these statistics, in words, or None."""
        if self.samples < 2:
            return "the batch holds one value a unit; g is left as it was, pass a larger batch"
        unusable = torch.nonzero(~self.usable).flatten().tolist()
        if not unusable:
            return None
        shown = ", ".join(map(str, unusable[:8])) + (", ..." if len(unusable) > 8 else "")
        return (
            f"{len(unusable)} of {self.usable.numel()} units are constant over the batch "
            f"({shown}); their g is left as it was"
        )

    def along(self, axis: int, output: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return one value a unit, shaped to broadcast over `output`."""
        shape = [1] * output.dim()
        shape[axis] = values.numel()
        return values.to(output.dtype).reshape(shape)


def unit_statistics(layer: nn.Module, output: torch.Tensor) -> Units:
    """Return mean and standard deviation of each unit of a layer's output."""
    axis = unit_axis(layer, output)
    values = output.movedim(axis, 0).flatten(1).double()
    samples = values.shape[1]
    mean = values.mean(1)
    std = values.std(1, correction=0) if samples > 1 else torch.zeros_like(mean)
    floor = _RELATIVE.get(output.dtype, 1e-2) * mean.abs()
    usable = torch.isfinite(std) & torch.isfinite(mean) & (std > floor) & (std > 0)
    return Units(mean, std, usable, samples)
