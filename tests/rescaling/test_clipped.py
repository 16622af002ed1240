"""Clipping activations: they pass no scale, and may become ReLUs by option."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from passes import Rebalance
from rewrite.outcomes import Contract
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model
from tests.passes.test_rebalance import RIGHT, error, rebalanced, unbalance_


def clipped_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    model = nn.Sequential(*layers).double()
    unbalance_(model[0], model[2])
    return model, torch.randn(2, 3, 4, 4, dtype=torch.float64)


def test_relu6_keeps_its_channels_and_says_so() -> None:
    model, x = clipped_model()
    result = rebalanced(model, x, objective="l2")
    assert [change.target for change in result.report.changes] == ["2"]
    reasons = {skip.target: skip.reason for skip in result.report.skips}
    assert "ReLU6" in reasons["0"] and "clip-channels" in reasons["1"]
    assert error(model, result.model, x) < RIGHT


def test_relu6_becomes_relu_by_option_and_the_change_is_measured() -> None:
    model, x = clipped_model()
    item = Rebalance(objective="l2", clipped="relu")
    assert item.contract is Contract.APPROXIMATE and Rebalance().contract is Contract.EXACT
    result = rewrite.convert(model, [item], example_inputs=(x,))
    targets = [change.target for change in result.report.changes]
    assert targets == ["1", "0", "2"] and type(result.model[1]) is nn.ReLU
    plain = copy_model(model)
    plain[1] = nn.ReLU()
    assert error(plain, result.model, x) < RIGHT
    assert result.report.to_json().count("another function")


def test_functional_clips_are_replaced_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.clamp(F.relu6(self.a(x)), 0, 5))

    model = Net().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    applied = apply_pass(Rebalance(clipped="relu"), copy_model(model), x)
    assert [change.after for change in applied.changes][:2] == ["ReLU", "ReLU"]
    with torch.no_grad():
        expected = model.b(F.relu(model.a(x)))
        torch.testing.assert_close(applied.model(x), expected, rtol=1e-12, atol=1e-13)
