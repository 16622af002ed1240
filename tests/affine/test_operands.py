"""Sums and products: what the other operand and the value have to become, held to numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError
from rewrite.affine.laws import Constraints
from rewrite.affine.operands import OperandRules
from rewrite.graph.capture import capture
from rewrite.graph.ranks import Ranks
from rewrite.graph.traits import call_of

X, Z = torch.randn(2, 2, 3, 4, dtype=torch.float64)
SCALE, SHIFT = torch.rand(3, 1).double() + 0.5, torch.randn(3, 1).double()
Form = Callable[[Tensor, Tensor], Tensor]


class Combines(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.form(x, z)


def around(form: Form, place: int, shift: bool, choice: int = 0) -> dict[int, ChannelMap]:
    """Return what x (0), z (1) and the value (2) become if the one at `place` changes."""
    captured = capture(Combines(form), (X, Z))
    nodes = [node for node in captured.nodes() if node.op != "output"]
    node: Node = nodes[-1]
    call = call_of(captured, node)
    assert call is not None
    rules = OperandRules(captured, Ranks(captured))
    given = ChannelMap(-2, torch.arange(3), scale=True, shift=shift)
    demanded = rules.around(call, nodes[place], given, Constraints(True, lambda count: choice))
    return {nodes.index(value): channel_map for value, channel_map in demanded.items()}


def mapped(x: Tensor, channel_map: ChannelMap | None) -> Tensor:
    if channel_map is None:
        return x
    x = x * SCALE if channel_map.scale else x
    return x + SHIFT if channel_map.shift else x


CASES = {
    "x + z": (lambda x, z: x + z, (0, 1, 2), True),
    "z added": (lambda x, z: torch.add(z, x), (0, 1, 2), True),
    "x - z": (lambda x, z: x - z, (0, 2), True),
    "x + 2 z": (lambda x, z: torch.add(x, z, alpha=2), (0, 2), True),
    "x z": (lambda x, z: x * z, (0, 1, 2), False),
    "x / z": (lambda x, z: x / z, (0, 2), False),
    "x - z, scaled": (lambda x, z: x.subtract(z), (0, 1, 2), False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_demanded_makes_up_for_the_change(name: str) -> None:
    form, places, shift = CASES[name]
    for place in places:
        for choice in (0, 1) if place == 2 and name in ("x + z", "x z") else (0,):
            maps = around(form, place, shift, choice)
            got = form(mapped(X, maps.get(0)), mapped(Z, maps.get(1)))
            assert torch.allclose(got, mapped(form(X, Z), maps[2]), rtol=1e-12, atol=1e-12)
            assert place in maps and not torch.allclose(got, form(X, Z), rtol=1e-3)


@pytest.mark.parametrize(
    ("form", "place", "shift", "reason"),
    [
        (lambda x, z: x - z, 1, True, "subtracts, and a shift would change its sign"),
        (lambda x, z: torch.add(x, z, alpha=2), 1, True, "weighs its operands"),
        (lambda x, z: x * z, 0, True, "multiplies: a shift does not pass"),
        (lambda x, z: x / z, 1, False, "divides by the value"),
        (lambda x, z: torch.div(x, z, rounding_mode="floor"), 0, False, "rounds its quotient"),
        (lambda x, z: x + 1.5, 0, False, "adds a constant, which would have to be scaled"),
        (lambda x, z: z + z, 1, False, "combines a value with itself"),
        (lambda x, z: x + z[:, :1], 0, False, "over the channels"),
    ],
)
def test_what_nothing_makes_up_for_is_declined(
    form: Form, place: int, shift: bool, reason: str
) -> None:
    with pytest.raises(DeclinedError, match=reason):
        around(form, place, shift)
