"""A weight through what computes it: read back it is what was given, or a note says what it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rewrite
from passes import Reinitialize
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.weights.assign import assign, assign_refusal

old_spectral_norm = pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")


def value(shape=(32, 16), scale=0.5):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def sigma(weight):
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1).double(), 2))


class Halved(nn.Module):
    def forward(self, x):
        return x / 2

    def right_inverse(self, x):
        return x * 2


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x):
        return x.triu()


@pytest.mark.parametrize(
    ("parametrized", "words"),
    [
        (lambda m: parametrize.register_parametrization(m, "weight", Halved()) or m, ""),
        (lambda m: parametrizations.weight_norm(m), ""),
        (lambda m: parametrizations.orthogonal(m), "Orthogonal makes of it"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "L1Unstructured makes of it"),
    ],
    ids=["invertible", "weight norm", "orthogonal", "pruned"],
)
def test_the_weight_is_read_back(parametrized, words):
    torch.manual_seed(0)
    layer = parametrized(nn.Linear(16, 32)).eval()
    note = assign(TensorWriter(), layer, "weight", value())
    same = torch.allclose(layer.weight.double(), value(), atol=1e-6)
    assert same == (not words)
    assert words in note
    assert bool(note) == bool(words)


def test_what_is_projected_says_how_far():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    note = assign(TensorWriter(), layer, "weight", value((8, 8)))
    assert "Symmetric makes of it" in note
    symmetric = value((8, 8)).triu() + value((8, 8)).triu(1).T
    away = float((symmetric - value((8, 8))).norm() / value((8, 8)).norm())
    assert f"{away:.2g} away" in note
    assert assign(TensorWriter(), layer, "weight", symmetric) == ""


def test_a_value_that_becomes_nan_leaves_the_weight_as_it_was():
    layer = parametrizations.spectral_norm(nn.Linear(16, 32)).eval()
    before = layer.weight.detach().clone()
    note = assign(TensorWriter(), layer, "weight", torch.zeros(32, 16, dtype=torch.float64))
    assert "left as it was" in note
    torch.testing.assert_close(layer.weight, before)


def test_a_parametrization_that_takes_no_value_is_refused_before():
    layer = parametrizations.orthogonal(nn.Linear(8, 8), use_trivialization=False)
    reason = assign_refusal(layer, "weight")
    assert reason is not None
    assert "takes no value" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "normed",
    [
        lambda layer: parametrizations.spectral_norm(layer),
        pytest.param(lambda layer: nn.utils.spectral_norm(layer), marks=old_spectral_norm),
    ],
    ids=["parametrization", "old hook"],
)
def test_reinitialization_reports_what_a_spectral_norm_makes(normed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), normed(nn.Linear(32, 16)))
    x = torch.randn(64, 16)
    for _ in range(30):
        model(x)
    model.eval()
    result = rewrite.convert(model, [Reinitialize(scheme="he")], example_inputs=(x,))
    new = result.model.eval()
    new(x)
    assert abs(sigma(new[2].weight) - 1) < 1e-5
    assert "times what was drawn" in str(result.report)
