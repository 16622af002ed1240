"""A norm that was swapped in, and the function of the old norm in terms of the same input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class SwappedNorm:
    """A new norm, and the old function in terms of its input: y = scale·z + bias.

    Attributes:
        target: the name to report.
        module: the new norm.
        scale, bias: γ and β of the old norm, in float64; scale is divided by what z is multiplied.
        gain: what the anchor multiplied the new norm's weight by.
        prefix: the channel affine in front of it, if there is one.
        standardized: whether its input is standardized.
        exact: the old function, where it is not scale and bias alone.
    """

    target: str
    module: nn.Module
    scale: Tensor
    bias: Tensor
    gain: float = 1.0
    prefix: nn.Module | None = None
    standardized: bool = True
    exact: nn.Module | None = None

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return -1 if type(self.module) is nn.LayerNorm else 1

    @property
    def groups(self) -> int:
        """How many means the norm takes of one sample."""
        if isinstance(self.module, nn.GroupNorm):
            return self.module.num_groups
        return 1 if isinstance(self.module, nn.LayerNorm) else len(self.scale)

    def old(self, z: Tensor) -> Tensor:
        """Return what the old norm returned."""
        if self.exact is not None:
            return torch.as_tensor(self.exact(z))
        shape = [1] * z.dim()
        shape[self.axis] = -1
        return torch.addcmul(self.bias.to(z).reshape(shape), z, self.scale.to(z).reshape(shape))

    def means(self, z: Tensor) -> Tensor:
        """Return what the norm takes a group's mean of, (samples, channels)."""
        if isinstance(self.module, nn.LayerNorm):
            return z.movedim(self.axis, -1).reshape(-1, len(self.scale))
        return z.flatten(2).mean(2) if z.dim() > 2 else z


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`: how many groups fit."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
