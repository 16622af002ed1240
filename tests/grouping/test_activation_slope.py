"""How much of an error an activation passes, against the derivative itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewrite.graph.capture import capture
from rewrite.graph.operators import norm_of
from rewrite.grouping.activation_slope import activation_slope

CHANNELS = 6


class Net(nn.Module):
    def __init__(self, rest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(x))


def share(rest: Callable[[Tensor], Tensor], scale: Tensor, bias: Tensor) -> Tensor:
    captured = capture(Net(rest).double().eval())
    norm = next(node for node in captured.nodes() if norm_of(captured, node) is not None)
    return activation_slope(captured, norm, scale, bias)


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5
    scale[1] *= -1
    return scale, torch.randn(CHANNELS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rest", "function"),
    [
        (nn.ReLU(), F.relu), (nn.ReLU6(inplace=True), F.relu6), (nn.SiLU(), F.silu),
        (nn.GELU(), F.gelu), (nn.Hardswish(), F.hardswish), (torch.sigmoid, torch.sigmoid),
        (lambda y: F.leaky_relu(y, 0.3), lambda y: F.leaky_relu(y, 0.3)),
        (lambda y: y.relu(), F.relu), (lambda y: F.relu(y, inplace=True), F.relu),
    ],
)  # fmt: skip
def test_the_share_is_the_mean_slope(rest: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    scale, bias = given()
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    y = (bias + scale * t).requires_grad_()
    function(y).sum().backward()
    assert y.grad is not None
    expected = y.grad.mean(0).abs()
    torch.testing.assert_close(share(rest, scale, bias), expected, atol=0.01, rtol=0.01)
    # The negative twin: the slopes of other norms are others.
    assert (share(rest, scale, bias + 1) - expected).abs().max() > 0.02


@pytest.mark.parametrize(
    "rest",
    [
        lambda y: y, lambda y: y * torch.sigmoid(y), nn.Softmax(1), nn.PReLU(CHANNELS),
        lambda y: F.relu(y) + y, nn.Conv2d(CHANNELS, 3, 1),
    ],
)  # fmt: skip
def test_without_one_activation_everything_passes(rest: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(share(rest, *given()), torch.ones(CHANNELS, dtype=torch.float64))


def test_a_dead_channel_has_a_small_finite_share() -> None:
    scale, bias = given()
    scale[0], bias[0] = 0.0, -3.0
    found = share(nn.ReLU(), scale, bias)
    assert bool(torch.isfinite(found).all())
    assert 0 < float(found[0]) <= 0.01
