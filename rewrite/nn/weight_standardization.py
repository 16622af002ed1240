"""The parametrization w = g (v − mean(v)) / √(var(v) + ε) + o, taken per output unit.

g and o of a weight are its own deviation √(var + ε) and its own mean: the weight comes back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightStandardization(nn.Module):
    """The parametrization (g, o, v) -> w; its inverse gives (deviation of w, mean of w, w).

    g and o have one number an output unit, (units,); v has the shape of the weight. `groups` and
    `inputs_first` say where the output units are, as in `rewrite.weights.layout.Layout`.
    """

    def __init__(self, groups: int = 1, inputs_first: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.inputs_first, self.eps = groups, inputs_first, eps

    def extra_repr(self) -> str:
        """Show ε, and the layout where it is not the plain one."""
        shown = [f"eps={self.eps}"] + [f"groups={self.groups}"] * (self.groups > 1)
        return ", ".join([*shown, *["inputs_first=True"] * self.inputs_first])

    def forward(self, gain: Tensor, offset: Tensor, v: Tensor) -> Tensor:
        """Return the weight."""
        grouped, mean, deviation = self._statistics(v)
        shape = mean.shape
        standardized = (grouped - mean) / deviation
        weight = standardized * gain.reshape(shape) + offset.reshape(shape)
        return weight.to(v.dtype).reshape(v.shape)

    def terms(self, gain: Tensor, offset: Tensor, v: Tensor) -> Tensor:
        """Return how large the terms are of which each value of the weight is the sum."""
        grouped, mean, deviation = self._statistics(v)
        shape = mean.shape
        spread = (grouped.abs() + self._statistics(v.abs())[1]) / deviation
        size: Tensor = spread * gain.reshape(shape).abs() + offset.reshape(shape).abs()
        return size.reshape(v.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return g, o and v of a weight; g and o are rounded once."""
        _, mean, deviation = self._statistics(weight.detach().double())
        return (
            deviation.reshape(-1).to(weight.dtype),
            mean.reshape(-1).to(weight.dtype),
            weight,
        )

    def _statistics(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return v by groups, and the mean and deviation of each unit; never in half precision."""
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        grouped = wide.reshape(self.groups, v.shape[0] // self.groups, *v.shape[1:])
        axes = (1 if self.inputs_first else 2, *range(3, grouped.dim()))
        mean = grouped.mean(axes, keepdim=True)
        variance = (grouped - mean).square().mean(axes, keepdim=True)
        return grouped, mean, (variance + self.eps).sqrt()
