"""What folding leaves: a norm as one multiply-add, and a norm without its affine part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from models.randomize import randomize_norms_
from passes import FoldNorm
from rewrite.fold.unfolded import drop_affine_part
from rewrite.graph.capture import capture
from rewrite.nn.modules import ChannelAffine


def between_activations() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Softmax(1))
    return randomize_norms_(model).double().eval()


def test_a_norm_that_nothing_absorbs_becomes_one_multiply_add() -> None:
    model, x = between_activations(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = rewrite.convert(model, FoldNorm(leftover="affine"), example_inputs=x)
    layer = result.model[2]
    assert isinstance(layer, ChannelAffine)
    assert (result.model(x) - model(x)).abs().max() < 1e-13
    norm = model[2]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(layer.weight, scale)
    torch.testing.assert_close(layer.bias, norm.bias - norm.running_mean * scale)


def test_the_change_says_why_and_where_each_tensor_went() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = rewrite.convert(between_activations(), FoldNorm(leftover="affine"), example_inputs=x)
    (change,) = result.report.changes
    assert change.target == "2" and change.after == "one multiply-add, 2" and change.note
    assert change.keys == {
        "2.weight": "2.weight", "2.bias": "2.bias", "2.running_mean": None, "2.running_var": None,
        "2.num_batches_tracked": None,
    }  # fmt: skip
    assert change.recipe["do"] == "affine" and change.recipe["name"] == "2"


@pytest.mark.parametrize("trains", [True, False])
def test_the_multiply_add_trains_as_the_norm_did(trains: bool) -> None:
    model, x = between_activations(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model[2].requires_grad_(trains)
    made = rewrite.convert(model, FoldNorm(leftover="affine"), example_inputs=x).model
    assert [p.requires_grad for p in made[2].parameters()] == [trains, trains]


def test_by_default_the_norm_stays() -> None:
    model, x = between_activations(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = rewrite.convert(model, FoldNorm(), example_inputs=x)
    assert type(result.model[2]) is nn.BatchNorm2d and result.report.skips


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
def test_a_norm_without_its_affine_part_normalizes_as_before(norm: nn.Module) -> None:
    randomize_norms_(norm)
    model = nn.Sequential(norm).double().eval()
    weight, bias = norm.weight.detach().clone(), getattr(norm, "bias", None)
    x = torch.randn(3, 4, dtype=torch.float64)
    want = model(x)
    drop_affine_part(capture(model), "0")
    assert type(model[0]) is type(norm) and dict(model.named_parameters()) == {}
    made = model(x) * weight + (0 if bias is None else bias)
    torch.testing.assert_close(made, want)
    assert (model(x) - want).abs().max() > 1e-3
