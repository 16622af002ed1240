"""Mean-only batch normalization.

    train:  y = x - mean_batch[x] + b      running_mean <- (1 - momentum) running_mean
                                                           + momentum mean_batch[x]
    eval:   y = x - running_mean + b

The mean is per channel, over batch and space. (Salimans & Kingma 2016, section 4: the companion of
weight normalization, which fixes the scale of a pre-activation but not its mean.)
"""

from __future__ import annotations

import torch
from torch import nn


class MeanOnlyBatchNorm(nn.Module):
    """Subtract each channel's mean over the batch, and add a learned bias.

    `channel_axis` is 1 for what a convolution returns and -1 for what a linear layer returns.
    """

    running_mean: torch.Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, channel_axis: int = 1) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.channel_axis = channel_axis
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))

    def extra_repr(self) -> str:
        """Show the options."""
        shown = f"{self.num_features}, momentum={self.momentum}"
        return shown if self.channel_axis == 1 else f"{shown}, channel_axis={self.channel_axis}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the centred input plus the bias."""
        axis = self.channel_axis % x.dim()
        mean = self.running_mean
        if self.training:
            mean = x.mean([a for a in range(x.dim()) if a != axis])
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        shape = [1] * x.dim()
        shape[axis] = self.num_features
        return x + (self.bias - mean).to(x.dtype).reshape(shape)
