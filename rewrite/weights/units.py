"""The axis of a weight or an output on which a layer's units lie."""

from __future__ import annotations

import torch
from torch import nn


def unit_axis(layer: nn.Module, output: torch.Tensor) -> int:
    """Return the axis of a layer's output that holds its units: channels or features."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return output.dim() - len(layer.kernel_size) - 1
    return output.dim() - 1
