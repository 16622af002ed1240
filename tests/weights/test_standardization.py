"""Weight standardization of one layer, and back."""

from __future__ import annotations

import torch
from torch import nn

from tests.passes.test_weight_standardize import _standardized


def test_units_of_a_transposed_convolution_are_its_outputs() -> None:
    made = _standardized(nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2)))[0]
    chain = made.parametrizations.weight
    assert chain.original0.shape == chain.original1.shape == (8,)
    with torch.no_grad():
        chain.original1[5] += 1.0
        moved = made.weight - chain.original2
    # Output 5 of 8 in two groups: the second group, its output 1, all of its three inputs.
    changed = torch.zeros(6, 4, dtype=torch.bool)
    changed[3:, 1] = True
    assert torch.equal(moved.abs().amax((2, 3)) > 0.5, changed)


def test_a_constant_unit_comes_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    with torch.no_grad():
        model[0].weight[0] = 0.25
        model[0].weight[1] = 0.0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(_standardized(model)(x), model(x), rtol=0, atol=1e-12)
