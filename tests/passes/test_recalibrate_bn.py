from __future__ import annotations

import pytest
import torch
from torch import nn

import models
import rewrite
from passes import RecalibrateBatchNorm
from rewrite.errors import OptionError, RewriteError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return models.randomize_norms_(model.append(nn.BatchNorm2d(4))).eval()  # type: ignore[return-value]


def recalibrated(model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    return rewrite.convert(
        model, [RecalibrateBatchNorm()], calibration=data, verify=False
    ).model  # fmt: skip


def test_rewrites_to_the_exact_average_whatever_the_batches() -> None:
    model, x = network(), 2 + torch.randn(9, 3, 8, 8)
    old = model[1].running_mean.clone()
    y = model[0](x)
    for batches in ([x], list(x.split((2, 7)))):
        norm = recalibrated(model, batches)[1]  # type: ignore[index]
        torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, y.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.equal(model[1].running_mean, old)
    assert not torch.allclose(old, y.mean((0, 2, 3)), atol=1e-2)


def test_later_norms_see_what_training_would_show_them() -> None:
    model, x = network(), torch.randn(16, 3, 8, 8)
    changed = recalibrated(model, [x])
    with torch.no_grad():
        seen = model[3](torch.relu(model[1].train()(model[0](x))))
    torch.testing.assert_close(
        changed[4].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5  # type: ignore[index]
    )  # fmt: skip


def test_a_recalibrated_model_agrees_with_itself_in_train_mode() -> None:
    x = torch.randn(32, 3, 8, 8)
    changed = recalibrated(network(), [x])
    with torch.no_grad():
        before = changed(x)
        assert (changed.train()(x) - before).abs().max() < 0.05


def test_subclasses_keep_what_they_do() -> None:
    model, inputs = models.build("norm_with_activation")
    changed = recalibrated(model.eval(), [inputs[0]])
    assert [type(m) for m in changed.modules()] == [type(m) for m in model.modules()]
    assert {n: m.training for n, m in changed.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }


def test_declines_norms_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False))
    result = rewrite.convert(model, [RecalibrateBatchNorm()], calibration=[], verify=False)
    assert "keeps no running statistics" in result.report.skips[0].reason


def test_needs_data() -> None:
    for data in (None, [], [torch.full((2, 3, 8, 8), float("nan"))]):
        with pytest.raises(RewriteError, match="calibration"):
            rewrite.convert(network(), [RecalibrateBatchNorm()], calibration=data, verify=False)
    with pytest.raises(OptionError, match=r"2x5x8x8.*to have 3 channels"):
        recalibrated(network(), [torch.randn(2, 5, 8, 8)])
