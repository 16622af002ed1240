"""rewrite.path_norm: against every path written out, under rescaling, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rewrite
from models import randomize_norms_
from rewrite.errors import OptionError
from rewrite.rescaling.path_norm import path_norms
from tests.rescaling.paths import ORDERS, RIGHT, WRONG

# -- batch norms ----------------------------------------------------------------------------------


def block(norm_first: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    if norm_first:
        layers = [nn.BatchNorm2d(3), *layers, nn.BatchNorm2d(4)]
    return randomize_norms_(nn.Sequential(*layers).double().eval())


def test_squaring_parameters_is_another_number() -> None:
    model, x = block(), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    squared = block()
    with torch.no_grad():
        for parameter in squared.parameters():
            parameter.square_()
        naive = float(squared(torch.ones_like(x)).sum().sqrt())
    assert abs(naive / rewrite.path_norm(model, 2, x) - 1) > WRONG


# -- rescaling ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999))
def test_does_not_notice_a_rescaling(seed: int) -> None:
    torch.manual_seed(seed)
    first, second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 3, 2)
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second).double()
    x = torch.zeros(4, 2, 8, 8)
    before = path_norms(model, ORDERS, x)
    scale = torch.exp(2 * torch.randn(6, dtype=torch.float64))
    with torch.no_grad():
        first.weight.mul_(scale.view(-1, 1, 1, 1))
        first.bias.mul_(scale)
        second.weight.div_(scale.view(1, -1, 1, 1))
    after = path_norms(model, ORDERS, x)
    for p in ORDERS:
        assert after[p] == pytest.approx(before[p], rel=RIGHT)
    with torch.no_grad():
        first.weight[0] *= 1.5
    assert abs(rewrite.path_norm(model, 2, x) / before[2.0] - 1) > 1e-6


# -- what is refused ------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("p", [0, -1, math.nan])
def test_refuses_orders_that_are_none(p: float) -> None:
    with pytest.raises(OptionError, match="pass a number > 0"):
        rewrite.path_norm(Functional(torch.relu), p, torch.zeros(1, 4))
