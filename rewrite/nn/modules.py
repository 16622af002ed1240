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
    """Scale and shift each channel: y[n, c, p] = weight[c] * x[n, c, p] + bias[c].

    Input and output: (N, C, *); with another `axis`, the channels are there.
    """

    axis = 1

    def __init__(self, weight: Tensor, bias: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        if axis != 1:
            self.axis = axis

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled and shifted `input`."""
        shape = [1] * input.dim()
        shape[self.axis] = -1
        return torch.addcmul(self.bias.reshape(shape), input, self.weight.reshape(shape))

    def extra_repr(self) -> str:
        """Show the number of channels, and their axis if it is not 1."""
        return f"{self.weight.numel()}" + (f", axis={self.axis}" if self.axis != 1 else "")


class ChannelClip(nn.Module):
    """Clip each channel between 0 and a bound of its own.

        y[n, c, p] = min(max(x[n, c, p], 0), bound[c])

    With one bound for all it is a ReLU6; a channel may be scaled together with its bound.

    Input and output: (*, C, ...), the shape of `bound` from the end, any floating dtype.

    Args:
        bound: floating, of shape (C,), (C, 1), (C, 1, 1), ...: C is the axis of the channels,
            counted from the end.
    """

    bound: Tensor

    def __init__(self, bound: Tensor) -> None:
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, input: Tensor) -> Tensor:
        """Return the clipped `input`."""
        return torch.minimum(input.relu(), self.bound.type_as(input))

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(self.bound.numel())


class ChannelMix(nn.Module):
    """Mix the channels (axis 1) within blocks of n consecutive ones, by a map of low rank k.

        y[n, :, p] = weight * x[n, :, p] + bias + up @ (down @ x[n, :, p])

    Input and output: (N, C, *); weight, bias: (C,); down: (blocks, k, n), up: (blocks, n, k).
    """

    def __init__(self, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.blocks, self.size, self.rank = up.shape

    def forward(self, input: Tensor) -> Tensor:
        """Return the mixed `input`."""
        batch, shape = input.shape[0], (1, -1, *(1,) * (input.dim() - 2))
        parts = input.reshape(batch * self.blocks, self.size, -1)
        low = torch.bmm(self.down.repeat(batch, 1, 1), parts)
        kept = torch.addcmul(self.bias.reshape(shape), input, self.weight.reshape(shape))
        # In place: reading and writing the values is what takes the time.
        mixed = kept.reshape(parts.shape).baddbmm_(self.up.repeat(batch, 1, 1), low)
        return mixed.reshape(input.shape)

    def extra_repr(self) -> str:
        """Show the number of channels, the blocks and the rank."""
        return f"{self.blocks * self.size}, blocks={self.blocks}, rank={self.rank}"
