"""BatchNorm to weight norm: the same eval function, no batch statistics left."""

import pytest
import torch
from torch import nn

import models
from passes import BatchNormToWeightNorm, FoldNorm
from rewrite.errors import OptionError
from rewrite.outcomes import Skip
from rewrite.pipeline import convert
from rewrite.runtime.copying import copy_model
from rewrite.weights.weight_norm import has_weight_norm


def run(model, inputs):
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(copy_model(model)(*inputs))
    return [out for out in outputs if isinstance(out, torch.Tensor)]


@pytest.mark.parametrize("mean_only", [False, True])
@pytest.mark.parametrize("name", sorted(models.all_models()))
def test_same_in_eval(name, mean_only):
    model, inputs = models.build(name)
    options = BatchNormToWeightNorm(mean_only=mean_only)
    result = convert(model, [options], example_inputs=inputs, verify=False)
    if name in ("train_mode", "train_mode_norm"):
        assert not result.report.changes or name == "train_mode_norm"
    tolerance = 2e-2 if name in ("bfloat16", "half", "mixed_precision") else 1e-10
    for was, now in zip(run(model, inputs), run(result.model, inputs), strict=True):
        torch.testing.assert_close(now, was, rtol=tolerance, atol=tolerance, equal_nan=True)


def net() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, groups=2), nn.BatchNorm2d(4),
    )  # fmt: skip
    return models.randomize_norms_(model).double().eval()


def test_replaces_norms_by_weight_norm():
    model = net()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = convert(model, [BatchNormToWeightNorm()], example_inputs=(x,))
    assert result.report.passes[0].verification.ok
    assert result.report.passes[0].violations == ()
    assert [c.target for c in result.report.changes] == ["1", "4"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())
    for index in (0, 3):
        assert has_weight_norm(result.model[index], "weight")
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
    # In train mode nothing depends on the batch any more, which is the difference.
    assert torch.equal(result.model.train()(x)[:1], result.model(x[:1]))
    assert (result.model(x) - copy_model(model).train()(x)).abs().max() > 1e-3


def test_declines_what_fold_declines():
    model, inputs = models.build("train_mode_norm")
    ours = convert(model, [BatchNormToWeightNorm()], example_inputs=inputs, verify=False).report
    folds = convert(model, [FoldNorm()], example_inputs=inputs, verify=False).report
    assert {s.reason for s in ours.skips} <= {s.reason for s in folds.skips}
    assert all(isinstance(s, Skip) for s in ours.skips)
    assert ours.skips


def test_declines_a_layer_that_is_normed_already():
    model = net()
    nn.utils.parametrizations.weight_norm(model[0])
    report = convert(model, [BatchNormToWeightNorm()], verify=False).report
    assert [c.target for c in report.changes] == ["4"]
    assert [s.target for s in report.skips] == ["1"]


def test_momentum_is_checked():
    with pytest.raises(OptionError, match="momentum"):
        BatchNormToWeightNorm(momentum=2.0)
