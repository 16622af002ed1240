"""The parametrization w = g v / ||v||: gradients, and rows of extreme norms."""

import pytest
import torch
from torch import nn

from rewrite.nn.weight_norm import WeightNorm
from rewrite.weights.weight_norm import (
    weight_layouts,
)
from tests.weights.test_weight_norm import LAYERS, normed


def test_gradients_are_those_of_the_paper():
    layer = normed(nn.Linear(5, 4).double())
    g, v = layer.parametrizations.weight.parameters()
    with torch.no_grad():
        v.mul_(torch.rand(4, 1, dtype=torch.float64) + 0.5)  # so that g is not |v|
    x, cotangent = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    layer(x).backward(cotangent)
    dw = cotangent.T @ x
    norm = v.detach().norm(dim=1, keepdim=True)
    dg = (dw * v.detach()).sum(1, keepdim=True) / norm
    dv = g.detach() / norm * dw - g.detach() * dg / norm**2 * v.detach()
    torch.testing.assert_close(g.grad, dg, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(v.grad, dv, rtol=1e-13, atol=1e-13)
    # Without the projection of equation 3 the gradient is another one.
    assert (v.grad - g.detach() / norm * dw).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["conv2d", "transposed2d", "embedding"])
def test_gradients_by_differences(kind):
    layer = LAYERS[kind]().double()
    (layout,) = weight_layouts(layer).values()
    inner = WeightNorm(layout.groups if layout.inputs_first else 1, layout.inputs_first)
    g, v = inner.right_inverse(layer.weight.detach())
    g, v = (1.3 * g).requires_grad_(), v.clone().requires_grad_()
    assert torch.autograd.gradcheck(inner, (g, v))


def test_a_zero_row_can_learn():
    layer = nn.Linear(6, 2)
    nn.init.zeros_(layer.weight)
    normed(layer)
    normalized = nn.functional.layer_norm(torch.randn(8, 6), (6,))
    layer(normalized)[:, 0].sum().backward()
    g, v = layer.parametrizations.weight.parameters()
    assert torch.isfinite(g.grad).all()
    assert g.grad[0].abs() > 1e-3
    assert torch.isfinite(v.grad).all()


def test_rows_whose_squares_underflow_or_overflow():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[0] *= 1e-30
        layer.weight[1] *= 1e25
    weight = layer.weight.detach().clone()
    normed(layer)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=0)
