"""Tensors beside a value take its scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewrite
from passes import Rebalance
from tests.passes.test_rebalance import RIGHT, error, unbalance_


class Beside(nn.Module):
    """A parameter of one number a channel that is added to a value, or read elsewhere too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.randn(1 if kind == "one number" else 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.maximum(y, -1 * self.shift) if self.kind == "computed" else y - self.shift
        y = self.b(torch.relu(y))
        return y + self.shift[:2] if self.kind == "read twice" else y


@pytest.mark.parametrize(
    ("kind", "scaled"),
    [("plain", 1), ("read twice", 0), ("one number", 0), ("computed", 0)],
)
def test_a_tensor_beside_a_value_is_scaled_with_it(kind: str, scaled: int) -> None:
    torch.manual_seed(0)
    model, x = Beside(kind).double(), torch.randn(5, 3, dtype=torch.float64)
    unbalance_(model.a)
    before = model.shift.detach().clone()
    result = rewrite.convert(model, [Rebalance("equalize")], example_inputs=(x,))
    assert len(result.report.changes) == scaled
    assert torch.equal(before, result.model.shift) is (scaled == 0)
    assert error(model, result.model, x) < RIGHT
