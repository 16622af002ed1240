"""The vectors of a spectral norm belong to its weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from rewrite.graph.tensor_writer import TensorWriter
from rewrite.weights.assign import assign
from rewrite.weights.spectral import leading_vectors
from tests.weights.test_assign import old_spectral_norm, sigma, value


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_leading_vectors_are_those_of_the_decomposition(shape):
    matrix = value(shape)
    u, v = leading_vectors(matrix)
    torch.testing.assert_close(u @ matrix @ v, torch.linalg.svdvals(matrix)[0])


class PowerNorm(nn.Module):
    """A spectral norm of somebody's own: one vector, moved at each reading in train mode."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("u", torch.ones(rows) / rows**0.5)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                v = nn.functional.normalize(x.T @ self.u, dim=0)
                self.u.copy_(nn.functional.normalize(x @ v, dim=0))
        return x / (self.u @ x).norm()

    def right_inverse(self, x):
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "normed",
    [
        lambda layer: parametrizations.spectral_norm(layer),
        pytest.param(lambda layer: nn.utils.spectral_norm(layer), marks=old_spectral_norm),
        lambda layer: parametrize.register_parametrization(layer, "weight", PowerNorm(32)) or layer,
    ],
    ids=["parametrization", "old hook", "somebody's own"],
)
def test_a_spectral_norm_gets_the_vectors_of_the_new_weight(normed, training):
    torch.manual_seed(0)
    layer = normed(nn.Linear(16, 32))
    layer.train(training)
    for _ in range(20):
        layer(torch.randn(4, 16))
    note = assign(TensorWriter(), layer, "weight", value())
    layer.eval()(torch.randn(4, 16))
    assert abs(sigma(layer.weight) - 1) < 1e-3
    expected = value() / sigma(value())
    torch.testing.assert_close(layer.weight.double(), expected, rtol=2e-3, atol=1e-4)
    assert "times what was drawn" in note
    assert layer.training is False


def test_a_spectral_norm_of_a_convolution_on_another_axis():
    layer = parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3), dim=1).eval()
    assign(TensorWriter(), layer, "weight", value((4, 6, 3, 3)))
    assert abs(sigma(layer.weight.transpose(0, 1)) - 1) < 1e-5
