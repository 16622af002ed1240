"""The classes that a rewritten model may contain beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import rewrite
from passes import FreezeBatchNorm
from rewrite.nn.modules import ChannelAffine, ChannelLayerNorm
from tests.passes.test_bn_to_ln import convert, model_of


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 8, 8), (2, 3, 6, 6, 6)])
def test_over_c_normalizes_the_channels_at_each_position(shape: tuple[int, ...]) -> None:
    dims = len(shape) - 2
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = model_of(conv(3, 8, 3), norm(8))
    x = torch.randn(shape)
    result = convert(model, x, over="c")
    y = model[0](x)
    mean, var = y.mean(1, keepdim=True), y.var(1, correction=0, keepdim=True)
    per_channel = (1, 8, *(1,) * dims)
    gamma, beta = model[1].weight.view(per_channel), model[1].bias.view(per_channel)
    expected = gamma * (y - mean) / (var + model[1].eps).sqrt() + beta
    assert torch.allclose(result.model(x), expected, atol=1e-5)
    assert not torch.allclose(result.model(x), F.group_norm(y, 1), atol=1e-2)
    assert type(result.model[1]) is ChannelLayerNorm


def test_training_changes_nothing_in_it() -> None:
    model = models.randomize_norms_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    x = torch.randn(4, 3, 6, 6)
    frozen = rewrite.convert(model, [FreezeBatchNorm()], example_inputs=(x,)).model
    expected = model(x)
    frozen.train()
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.train()(x), expected, atol=1e-2)
    assert isinstance(frozen[1], ChannelAffine) and not frozen[1].weight.requires_grad
