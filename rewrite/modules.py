"""The few module classes that a rewritten model may contain beside torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels (axis 1) at each position, as ConvNeXt does.

        y[n, c, p] = weight[c] * (x[n, c, p] - mean) / sqrt(var + eps) + bias[c],
        mean, var over x[n, :, p]

    Input and output: (N, C, *), any floating dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` of shape (N, C, *) over axis 1."""
        moved = input.movedim(1, -1)
        normalized = F.layer_norm(moved, self.normalized_shape, self.weight, self.bias, self.eps)
        return normalized.movedim(-1, 1)


class ChannelAffine(nn.Module):
    """Scale and shift each channel (axis 1): y[n, c, p] = weight[c] * x[n, c, p] + bias[c].

    Input and output: (N, C, *).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled and shifted `input`."""
        shape = (1, -1, *(1,) * (input.dim() - 2))
        return torch.addcmul(self.bias.reshape(shape), input, self.weight.reshape(shape))

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(self.weight.numel())
