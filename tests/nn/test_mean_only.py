"""Mean-only batch normalization."""

import torch
from torch import nn

from passes import BatchNormToWeightNorm, WeightNorm
from rewrite.nn.mean_only import MeanOnlyBatchNorm
from rewrite.pipeline import convert
from tests.passes.test_bn_to_weight_norm import net as normed
from tests.passes.test_weight_norm import net


def test_mean_only_is_exact_in_eval_and_centres_in_train():
    model = net().double().eval()
    x = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    result = convert(model, [WeightNorm(mean_only=True)], example_inputs=(x,))
    assert result.report.passes[0].verification.ok
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
    moved = {old: new for c in result.report.changes for old, new in c.keys.items()}
    assert moved["0.bias"] == "0.mean.bias"
    assert moved["0.weight"] == "0.layer.parametrizations.weight.original1"
    assert set(moved.values()) <= set(result.model.state_dict())
    trained = result.model.train()
    bias = trained[0].mean.bias
    centred = trained[0](x)
    torch.testing.assert_close(centred.mean((0, 2, 3)), bias)
    assert (trained(x) - model(x)).abs().max() > 1e-3


def test_mean_only_leaves_out_what_has_no_single_preactivation():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Embedding(3, 4))
    report = convert(model, [WeightNorm(mean_only=True)], verify=False).report
    notes = {c.target: c.note for c in report.changes}
    assert "a batch norm follows" in notes["0"]
    assert "embedding" in notes["2"]


def test_running_mean_moves_by_momentum():
    norm = MeanOnlyBatchNorm(2, momentum=0.25)
    x = torch.randn(8, 2, 3)
    norm.train()(x)
    torch.testing.assert_close(norm.running_mean, 0.25 * x.mean((0, 2)))
    norm.eval()
    torch.testing.assert_close(norm(x), x - norm.running_mean[:, None])


def test_mean_only_centres_each_batch():
    model = normed()
    x = 2 + torch.randn(16, 3, 8, 8, dtype=torch.float64)
    out = convert(model, [BatchNormToWeightNorm(mean_only=True)], example_inputs=(x,)).model
    assert isinstance(out[1], MeanOnlyBatchNorm)
    torch.testing.assert_close(out(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1].bias, model[1].bias)
    centred = nn.Sequential(out[0], out[1]).train()(x)
    torch.testing.assert_close(centred.mean((0, 2, 3)), model[1].bias)
