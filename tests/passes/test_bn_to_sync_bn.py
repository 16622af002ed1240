from __future__ import annotations

import pytest
import torch
from torch import nn

import models
import rewrite
from passes import BatchNormToSyncBatchNorm, SyncBatchNormToBatchNorm
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model


@pytest.mark.parametrize("name", ["functional_norm", "norm_with_activation", "shared_norm"])
def test_rewrites_there_and_back_to_the_same_function(name: str) -> None:
    model, inputs = models.build(name)
    model.eval()
    there = apply_pass(BatchNormToSyncBatchNorm(), copy_model(model))
    assert there.changes
    norms = [m for m in there.model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms and not any(m.training for m in norms)
    with torch.no_grad():
        expected = model(*inputs)
        torch.testing.assert_close(there.model(*inputs), expected, rtol=1e-12, atol=1e-12)
    back = apply_pass(SyncBatchNormToBatchNorm(), there.model, inputs)
    assert len(back.changes) == len({id(m) for m in norms})
    with torch.no_grad():
        torch.testing.assert_close(back.model(*inputs), expected, rtol=1e-12, atol=1e-12)


def test_the_tensors_are_the_same() -> None:
    model = models.randomize_norms_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    keys = model.state_dict().keys()
    there = rewrite.convert(model, [BatchNormToSyncBatchNorm()], verify=False).model
    back = rewrite.convert(there, [SyncBatchNormToBatchNorm()], verify=False).model
    assert type(back[1]) is nn.BatchNorm2d
    for changed in (there, back):
        assert changed.state_dict().keys() == keys
        for key in keys:
            assert torch.equal(changed.state_dict()[key], model.state_dict()[key])
    assert there[1].momentum == model[1].momentum and there[1].eps == model[1].eps


def test_activations_of_a_subclass_stay() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), timm_layers.BatchNormAct2d(8)).eval()
    models.randomize_norms_(model)
    x = torch.randn(2, 3, 6, 6)
    changed = apply_pass(BatchNormToSyncBatchNorm(), copy_model(model)).model
    torch.testing.assert_close(changed(x), model(x))
    assert (changed(x) >= 0).all()
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(copy_model(model))
    assert not torch.allclose(plain(x), model(x), atol=1e-3)


def test_leaves_what_is_one_already() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(8)).eval()
    assert not apply_pass(BatchNormToSyncBatchNorm(), model).changes
    assert not apply_pass(SyncBatchNormToBatchNorm(), nn.Sequential(nn.BatchNorm2d(8))).changes


def test_declines_what_has_an_unknown_number_of_axes() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(8)).eval()
    assert "pass an example input" in apply_pass(SyncBatchNormToBatchNorm(), model).skips[0].reason
    applied = apply_pass(SyncBatchNormToBatchNorm(), model, (torch.randn(2, 8),))
    assert type(applied.model[0]) is nn.BatchNorm1d  # type: ignore[index]
