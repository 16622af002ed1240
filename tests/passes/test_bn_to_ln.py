from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import rewrite
from passes import BatchNormToLayerNorm
from rewrite.errors import OptionError


def model_of(*layers: nn.Module) -> nn.Sequential:
    return models.randomize_norms_(nn.Sequential(*layers).eval(), 0)


def convert(
    model: nn.Module, x: torch.Tensor | None, **options: object
) -> rewrite.Result[nn.Module]:
    return rewrite.convert(
        model, [BatchNormToLayerNorm(keep="affine", **options)],
        example_inputs=None if x is None else (x,), verify=x is not None,
    )  # fmt: skip


def test_over_chw_is_group_norm_with_one_group() -> None:
    model = model_of(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3))
    x = torch.randn(2, 3, 8, 8)
    result = convert(model, x)
    y = model[0](x)
    expected = F.group_norm(y, 1, model[1].weight, model[1].bias, 1e-3)
    assert torch.equal(result.model(x), expected)
    assert result.report.changes[0].after == "GroupNorm(1, 8)"


@pytest.mark.parametrize("over", ["c", "chw"])
def test_on_flat_input_both_are_layer_norm(over: str) -> None:
    model = model_of(nn.Linear(4, 8), nn.BatchNorm1d(8))
    result = convert(model, torch.randn(2, 4), over=over)
    assert type(result.model[1]) is nn.LayerNorm


def test_declines_a_single_channel() -> None:
    model = model_of(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1))
    assert "1 channel" in convert(model, torch.randn(2, 3, 8, 8), over="c").report.skips[0].reason
    assert convert(model, torch.randn(2, 3, 8, 8)).report.changes
    assert "1 channel" in convert(model, None).report.skips[0].reason


def test_leaves_the_rest_alone() -> None:
    model = model_of(nn.LayerNorm(4), nn.GroupNorm(2, 4))
    assert not convert(model, None).report.changes


def test_options() -> None:
    with pytest.raises(OptionError, match="over is 'hw'; pass 'chw' or 'c'"):
        BatchNormToLayerNorm(over="hw")
