"""A layer whose weight is computed, as the plain layer that it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from rewrite.graph.capture import capture
from rewrite.graph.editable import Editable
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.weights.baking import bake as bake_layer
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


class _Absolute(nn.Module):
    def forward(self, weight):
        return weight.abs() / weight.abs().sum()


class _Steps(nn.Module):
    """Rounds to steps of 0.3: float64 may take the next one."""

    def forward(self, weight):
        return (weight / 0.3).round() * 0.3 if weight.dtype == torch.float32 else weight * 2


@pytest.mark.parametrize(("step", "alike"), [(_Absolute(), True), (_Steps(), False)])
def test_what_float64_computes_alike_is_rounded_once_and_all_else_stays_bit_for_bit(step, alike):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    parametrize.register_parametrization(model[0], "weight", step)
    kept = model[0].weight.detach().clone()
    wide = step(model[0].parametrizations.weight.original.detach().double())
    baked = bake_layer(Editable.of(capture(model)), "0")
    stored = model[0].weight.detach()
    assert (baked.exact.keys() == {"0.weight"}) is alike
    if alike:
        assert torch.equal(baked.exact["0.weight"], wide) and torch.equal(stored, wide.float())
    else:
        assert torch.equal(stored, kept)
