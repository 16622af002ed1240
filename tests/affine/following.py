"""One operation between an input and an output, and a map of channels followed through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, Direction
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured


class Operation(nn.Module):
    """x -> f(x)."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def captured_of(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Captured, list[Node]]:
    """Return the graph of f, and its calls, the input first."""
    captured = capture(Operation(f), (x,))
    return captured, [node for node in captured.nodes() if node.op != "output"]


def scaled(x: Tensor, channel_map: ChannelMap, scale: Tensor) -> Tensor:
    """Return x with each channel multiplied by its own number, as a map lays it out."""
    factors = torch.where(channel_map.index >= 0, scale[channel_map.index], 1.0)
    shape = [1] * x.dim()
    shape[channel_map.axis] = len(factors)
    return x * factors.view(shape)


def check(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    axis: int,
    follow: Callable[[Captured, Node, ChannelMap, Direction], ChannelMap | None],
) -> None:
    """Hold a map that was followed both ways to numbers: f(s.x) = s'.f(x)."""
    captured, nodes = captured_of(f, x)
    channels = x.shape[axis]
    scale = torch.rand(channels, dtype=torch.float64) + 0.5
    start = ChannelMap(axis - x.dim() if axis >= 0 else axis, torch.arange(channels))
    there = follow(captured, nodes[-1], start, Direction.FORWARD)
    assert there is not None
    got = f(scaled(x, start, scale))
    assert torch.allclose(got, scaled(f(x), there, scale), rtol=1e-13)
    assert not torch.allclose(got, scaled(f(x), there, scale.flip(0)), rtol=1e-3)
    back = follow(captured, nodes[-1], there, Direction.BACKWARD)
    assert back is not None and back.same(start)
