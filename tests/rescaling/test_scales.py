"""Which channels share one scale, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes import Rebalance
from rewrite.protocol import apply_pass
from tests.passes.test_rebalance import RIGHT, error, rebalanced, two_layers, unbalance_


class Declined(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "tied":
            self.c.weight = self.a.weight
        if kind == "hook":
            self.a.register_forward_hook(lambda *_: None)
        if kind == "half":
            self.to(torch.bfloat16)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x) if self.kind == "half" else x
        y = self.a(x)
        if self.kind == "tanh":
            y = torch.tanh(y)
        if self.kind == "constant":
            y = torch.relu(y + 0.5)
        if self.kind == "product":
            y = y * y
        if self.kind == "input":
            y = torch.relu(y) + x
        if self.kind == "returned":
            return self.b(torch.relu(y)), y
        return self.b(torch.relu(y))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tied", "one tensor with"),
        ("hook", "forward hook"),
        ("half", "stored in torch.bfloat16"),
        ("tanh", "does not commute"),
        ("constant", "adds something whose scale is fixed"),
        ("product", "multiplies or divides two computed values"),
        ("input", "adds something whose scale is fixed"),
        ("returned", "returned"),
    ],
)
def test_declines(kind: str, reason: str) -> None:
    model = Declined(kind)
    unbalance_(model.a)
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    applied = apply_pass(Rebalance(), model, torch.randn(2, 4, dtype=dtype))
    assert not applied.changes
    assert any(skip.target == "a" and reason in skip.reason for skip in applied.skips)


def test_a_plain_twin_of_what_is_declined_is_rewritten() -> None:
    model = Declined("plain")
    unbalance_(model.a)
    assert [c.target for c in apply_pass(Rebalance(), model, torch.randn(2, 4)).changes] == ["a"]


def test_a_unit_that_nothing_writes_or_reads_is_left_alone() -> None:
    model, x = two_layers()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight[:, 1] = 0
    result = rebalanced(model, x, objective="l2")
    assert torch.equal(result.model[0].weight[1], model[0].weight[1])
    assert error(model, result.model, x) < RIGHT


def test_a_shared_layer_is_scaled_at_all_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(torch.relu(self.b(x)))))

    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(3, 4, dtype=torch.float64)
    unbalance_(model.a, model.b)
    result = rebalanced(model, x)
    assert [change.target for change in result.report.changes] == ["a"]
    assert error(model, result.model, x) < RIGHT
