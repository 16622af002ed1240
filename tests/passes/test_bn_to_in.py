from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import rewrite
from passes import BatchNormToInstanceNorm


def model_of(*layers: nn.Module) -> nn.Sequential:
    return models.randomize_norms_(nn.Sequential(*layers).eval(), 0)


def convert(model: nn.Module, x: torch.Tensor | None) -> rewrite.Result[nn.Module]:
    return rewrite.convert(
        model, [BatchNormToInstanceNorm(keep="affine")],
        example_inputs=None if x is None else (x,), verify=x is not None,
    )  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rewrites_every_dimension(dims: int, known: bool) -> None:
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = model_of(conv(3, 8, 3), norm(8, eps=1e-3))
    x = torch.randn(2, 3, *(6,) * dims)
    result = convert(model, x if known else None)
    assert type(result.model[1]) is getattr(nn, f"InstanceNorm{dims}d")
    y = model[0](x)
    expected = F.instance_norm(y, weight=model[1].weight, bias=model[1].bias, eps=1e-3)
    assert torch.equal(result.model(x), expected)
    assert not torch.allclose(expected, F.instance_norm(y, eps=1e-3), atol=1e-2)


def test_declines_one_position() -> None:
    model = model_of(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    skip = convert(model, torch.randn(2, 3, 8, 8)).report.skips[0]
    assert skip.reason == ("gets one position (2×3×1×1): an instance of one element would output β")


def test_declines_flat_input() -> None:
    model = model_of(nn.Linear(4, 8), nn.BatchNorm1d(8))
    assert "one position" in convert(model, torch.randn(2, 4)).report.skips[0].reason


def test_declines_an_unknown_number_of_axes() -> None:
    """`InstanceNorm1d` would take (N, C) for (C, L) in silence."""
    model = model_of(nn.Linear(4, 8), nn.BatchNorm1d(8))
    assert "pass an example input" in convert(model, None).report.skips[0].reason


def test_leaves_the_rest_alone() -> None:
    model = model_of(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    assert not convert(model, None).report.changes
