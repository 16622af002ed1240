"""Data-dependent initialization of a weight norm."""

import copy

import pytest
import torch
from torch import nn

from passes import WeightNorm
from rewrite.pipeline import convert
from rewrite.runtime.copying import copy_model
from tests.passes.test_weight_norm import net, preactivations


def test_data_init_standardizes_every_preactivation():
    torch.manual_seed(1)
    model = net().double()
    x = 3 + 2 * torch.randn(16, 3, 10, 10, dtype=torch.float64)
    fitted = convert(model, [WeightNorm(data_init=True)], calibration=[x], verify=False)
    out = fitted.model
    assert all("std before" in c.metrics for c in fitted.report.changes)
    assert out[2].bias is not None
    assert "a bias was added" in fitted.report.changes[1].note
    seen = preactivations(out, x, {n: out.get_submodule(n) for n in ("0", "2", "6")})
    for value in seen.values():
        flat = value.movedim(1, 0).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros_like(flat[:, 0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones_like(flat[:, 0]))
    # Fitting every layer on the *old* model's activations would not give that.
    before = preactivations(copy_model(model), x, {})
    assert not before
    assert model[2].bias is None


def test_data_init_follows_calls_that_no_tracer_can():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 4)
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(hidden if hidden.sum() > -1e9 else -hidden)

    model = Branching().double()
    x = 5 + torch.randn(32, 4, dtype=torch.float64)
    out = convert(model, [WeightNorm(data_init=True)], calibration=[x], verify=False).model
    seen = preactivations(out, x, {"first": out.first, "last": out.last})
    for value in seen.values():
        torch.testing.assert_close(value.std(0, correction=0), torch.ones(4, dtype=x.dtype))
        torch.testing.assert_close(value.mean(0), torch.zeros(4, dtype=x.dtype))


def test_data_init_with_one_sample_names_the_layer():
    model = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"^0: the batch holds one value a unit"):
        out = convert(
            model, [WeightNorm(data_init=True)], calibration=[torch.ones(1, 3)], verify=False
        )
    assert torch.equal(out.model[0].weight, before[0].weight)
    assert torch.equal(out.model[0].bias, before[0].bias)


def test_data_init_with_a_constant_unit_names_it():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
    with pytest.warns(UserWarning, match=r"^0: 1 of 2 units are constant over the batch \(1\)"):
        result = convert(
            model, [WeightNorm(data_init=True)], calibration=[torch.randn(64, 3)], verify=False
        )
    y = result.model(torch.randn(64, 3))
    assert torch.isfinite(y).all()
    assert torch.equal(result.model[0].bias[1], model[0].bias[1])
    assert not torch.equal(result.model[0].bias[0], model[0].bias[0])
    assert "constant" in result.report.changes[0].note
