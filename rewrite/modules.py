"""The few module classes that a rewritten model may contain beside torch's own."""

from __future__ import annotations

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
