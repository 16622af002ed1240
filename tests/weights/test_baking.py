"""A layer whose weight is computed, as the plain layer that it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rewrite.graph.tensor_writer import TensorWriter
from rewrite.weights.weight_norm import add_weight_norm, weight_layouts
from rewrite.weights.weight_norm_keys import bake


@pytest.mark.parametrize("groups", [1, 2])
def test_baking_agrees_with_the_module(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    ((name, layout),) = weight_layouts(layer).items()
    add_weight_norm(TensorWriter(), layer, name, layout)
    g, v = layer.parametrizations.weight.parameters()
    with torch.no_grad():
        g.mul_(torch.rand_like(g) + 0.5)
        g[0], v[0] = 0, 0
    torch.testing.assert_close(bake(g, v), layer.weight, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_baking_agrees_with_torch(dim):
    layer = copy.deepcopy(weight_norm(nn.Linear(5, 3), dim=dim))
    g, v = layer.parametrizations.weight.parameters()
    torch.testing.assert_close(bake(g, v), layer.weight)
