"""The parametrization w = g v / |v|, taken per output unit in any layout."""

from __future__ import annotations

import torch
from torch import nn


class WeightNorm(nn.Module):
    """The parametrization (g, v) -> w; its inverse gives (||w||, w).

    `groups` and `inputs_first` say where the output units are, as in
    `rewrite.weights.layout.Layout`.
    """

    def __init__(self, groups: int = 1, inputs_first: bool = False) -> None:
        super().__init__()
        self.groups = groups
        self.inputs_first = inputs_first

    def extra_repr(self) -> str:
        """Show the layout where it is not the plain one."""
        shown = [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join([*shown, *(["inputs_first=True"] if self.inputs_first else [])])

    def forward(self, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the weight."""
        grouped = self._grouped(v)
        norm = self._norm(grouped)
        zero = norm == 0
        scale = (self._grouped_g(g, v).to(norm.dtype) / norm.masked_fill(zero, 1)).masked_fill(
            zero, 0
        )
        # In half precision the product is taken in float32 and rounded once.
        return (grouped * scale).to(v.dtype).reshape(v.shape)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return g and v of a weight."""
        grouped = self._grouped(weight.detach())
        norm = self._norm(grouped)
        broken = (norm == 0) | ~torch.isfinite(norm)
        if weight.is_meta or not bool(broken.any()):
            return self._ungrouped_g(norm.to(weight.dtype), weight), weight
        v, norm = self._repaired(grouped, norm, broken)
        return self._ungrouped_g(norm.to(weight.dtype), weight), v.reshape(weight.shape)

    def _grouped(self, v: torch.Tensor) -> torch.Tensor:
        """Return v as (groups, axis 0 / groups, axis 1, *kernel)."""
        return v.reshape(self.groups, v.shape[0] // self.groups, *v.shape[1:])

    def _inputs(self, grouped: torch.Tensor) -> tuple[int, ...]:
        """Return the axes of the grouped weight over which a norm is taken."""
        return (1 if self.inputs_first else 2, *range(3, grouped.dim()))

    def _grouped_g(self, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.groups > 1 and self.inputs_first:
            return g
        return g.reshape(self.groups, g.shape[0] // self.groups, *g.shape[1:])

    def _ungrouped_g(self, norm: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the norms in the shape that PyTorch gives g, where the layout has one."""
        if self.groups > 1 and self.inputs_first:
            return norm
        return norm.reshape(norm.shape[0] * norm.shape[1], *norm.shape[2:])

    def _norm(self, grouped: torch.Tensor) -> torch.Tensor:
        """Return the norms, rounded as the stored g is, in the dtype of the computation."""
        wide = torch.promote_types(grouped.dtype, torch.float32)
        axes = self._inputs(grouped)
        norm: torch.Tensor = torch.linalg.vector_norm(grouped, dim=axes, keepdim=True, dtype=wide)
        return norm.to(grouped.dtype).to(wide) if grouped.dtype != wide else norm

    def _repaired(
        self, grouped: torch.Tensor, norm: torch.Tensor, broken: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        axes = self._inputs(grouped)
        peak = grouped.abs().amax(dim=axes, keepdim=True)
        random = torch.Generator().manual_seed(0)
        direction = torch.randn(grouped.shape, dtype=torch.float32, generator=random)
        direction = direction.to(device=grouped.device, dtype=grouped.dtype)
        rescaled = grouped / peak.masked_fill(peak == 0, 1)
        v = torch.where(broken, torch.where(peak == 0, direction, rescaled), grouped)
        return v, torch.where(broken, self._norm(v) * peak.to(norm.dtype), norm)
