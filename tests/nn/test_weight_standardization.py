"""The parametrization w = g (v − mean(v)) / √(var(v) + ε) + o: its units, and its gradient."""

from __future__ import annotations

import torch
from torch import nn

from tests.passes.test_weight_standardize import _standardized


def test_the_gradient_of_v_is_orthogonal_to_a_shift() -> None:
    made = _standardized(nn.Sequential(nn.Conv2d(6, 8, 3)).double())
    made(torch.randn(2, 6, 9, 9, dtype=torch.float64)).square().sum().backward()
    gradient = made[0].parametrizations.weight.original2.grad
    assert gradient.abs().max() > 1e-3 and gradient.sum((1, 2, 3)).abs().max() < 1e-10
