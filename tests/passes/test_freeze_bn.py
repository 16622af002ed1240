from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from passes import FreezeBatchNorm
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model


@pytest.mark.parametrize(
    "name", ["functional_norm", "norm_with_activation", "shared_norm", "norm1d", "affine_free"]
)
def test_rewrites_to_the_same_function(name: str) -> None:
    model, inputs = models.build(name)
    model.eval()
    applied = apply_pass(FreezeBatchNorm(), copy_model(model))
    assert applied.changes
    with torch.no_grad():
        torch.testing.assert_close(applied.model(*inputs), model(*inputs), rtol=1e-11, atol=1e-11)


def test_options() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    applied = apply_pass(FreezeBatchNorm(trainable=True), model)
    assert all(p.requires_grad for p in applied.model.parameters())


def test_declines_norms_without_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    applied = apply_pass(FreezeBatchNorm(), model)
    assert not applied.changes and "no running statistics" in applied.skips[0].reason


def test_declines_a_scale_that_is_not_finite() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0)).eval()
    model[1].running_var[0] = 0.0
    assert "not finite" in apply_pass(FreezeBatchNorm(), model).skips[0].reason


class Penalty(nn.Module):
    """Returns the sum of its norm's weights as well, which a scale is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bn(self.conv(x)), self.bn.weight[:2].sum()


def test_declines_a_norm_whose_weight_code_reads() -> None:
    applied = apply_pass(FreezeBatchNorm(), Penalty().eval())
    assert not applied.changes
    assert "bn.weight is also read by getitem directly" in applied.skips[0].reason
