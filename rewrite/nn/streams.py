"""Modules of streams that have been centred.

Centre           x - mean(x)
ShiftedRMSNorm   w x / sqrt(mean(x^2) + eps) + b
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Centre(nn.Module):
    """Subtract the mean over the last axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the centred input."""
        return x - x.mean(-1, keepdim=True)


class ShiftedRMSNorm(nn.Module):
    """An RMSNorm over the last axis that adds a bias, as a LayerNorm of centred values does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.size}, eps={self.eps}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input, scaled and shifted."""
        return F.rms_norm(x, (self.size,), self.weight, self.eps) + self.bias
