"""Plans to absorb a map: which layers take which part, or the reason of the first alternative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.affine.layers import Side
from rewrite.affine.plan import Absorption
from rewrite.affine.planner import Planner, plan_backward
from rewrite.graph.capture import capture
from rewrite.graph.operators import norm_of
from rewrite.outcomes import Declined

X = torch.randn(2, 3, 8, 8)


class Sum(nn.Module):
    """Two convolutions, added, and a norm of the sum; `kind` says what stands in the way."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.kind == "first is gelu":
            one = nn.functional.gelu(one)
        if self.kind == "first is relu":
            one = torch.relu(one)
        y = self.norm(one + two)
        return y + one if self.kind == "read twice" else y


def planned(kind: str = "", positive: bool = False) -> Absorption | Declined:
    captured = capture(Sum(kind).eval(), (X,))
    node = next(n for n in captured.nodes() if norm_of(captured, n) is not None)
    return plan_backward(captured, node, positive=positive)


def test_each_summand_absorbs_the_scale_and_one_the_shift() -> None:
    plan = planned()
    assert isinstance(plan, Absorption) and set(plan.layers) == {"one", "two"}
    assert all(edit.scale and edit.side is Side.OUTPUT and not edit.inverse for edit in plan.edits)
    assert [edit.shift for edit in plan.edits].count(True) == 1


def test_the_other_summand_takes_the_shift_where_the_first_cannot() -> None:
    plan = planned("first is relu", positive=True)
    assert isinstance(plan, Absorption) and plan.needs_positive
    assert {edit.layer.name: edit.shift for edit in plan.edits} == {"one": False, "two": True}


@pytest.mark.parametrize(
    ("kind", "positive", "reason"),
    [
        ("first is relu", False, "relu"),
        ("first is gelu", True, "gelu"),
        ("read twice", True, "one"),
    ],
)
def test_where_no_alternative_holds_the_reason_names_what_stands_in_the_way(
    kind: str, positive: bool, reason: str
) -> None:
    plan = planned(kind, positive)
    assert isinstance(plan, Declined) and reason in plan.reason and plan.nodes


def test_what_is_no_norm_has_no_plan() -> None:
    captured = capture(Sum().eval(), (X,))
    conv = next(n for n in captured.nodes() if n.target == "one")
    plan = plan_backward(captured, conv)
    assert isinstance(plan, Declined) and "is no normalization" in plan.reason


def test_the_channel_axis_of_an_input_is_known_by_its_rank_or_its_reader() -> None:
    captured = capture(Sum().eval(), (X,))
    place = next(n for n in captured.nodes() if n.op == "placeholder")
    assert Planner(captured).channel_axis_of_input(place) == -3
    without = capture(Sum().eval())
    place = next(n for n in without.nodes() if n.op == "placeholder")
    assert Planner(without).channel_axis_of_input(place) == -3
