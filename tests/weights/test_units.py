"""The axis on which the units of a layer lie."""

import pytest
import torch
from torch import nn

from rewrite.weights.fans import linear_maps


@pytest.mark.parametrize("groups", [1, 2])
def test_units_of_a_transposed_convolution_are_its_outputs(groups):
    conv = nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False)
    (linear_map,) = linear_maps(conv)
    scale = torch.arange(1.0, 7.0)
    x = torch.randn(1, 4, 5)
    before = conv(x)
    with torch.no_grad():
        units = linear_map.layout.units(conv.weight).clone()
        units *= scale.reshape(groups, 6 // groups, 1, 1)
        conv.weight.copy_(linear_map.layout.weight(units))
    torch.testing.assert_close(conv(x), before * scale[:, None])
    # Axis 0 would scale the inputs instead.
    with torch.no_grad():
        conv.weight.copy_(conv.weight * torch.arange(1.0, 5.0).reshape(4, 1, 1))
    assert not torch.allclose(conv(x), before * scale[:, None], rtol=1e-3)
