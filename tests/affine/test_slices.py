"""Channels of a part: the map of the whole at those positions, and nothing of the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.slices import Parts
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from tests.affine.following import captured_of, scaled

X = torch.randn(2, 8, 4, dtype=torch.float64)
SCALE = torch.rand(8, dtype=torch.float64) + 0.5
WHOLE = ChannelMap(-2, torch.arange(8).flip(0))
Form = Callable[[Tensor], Tensor]


def parts_of(form: Form) -> tuple[Captured, list[Node], Parts]:
    captured, nodes = captured_of(form, X)
    return captured, nodes, Parts(captured, Ranks(captured))


@pytest.mark.parametrize(
    ("form", "kept"),
    [
        (lambda x: x[:, 2:5], range(2, 5)), (lambda x: x[:, ::2], range(0, 8, 2)),
        (lambda x: x[..., -3:, :], range(5, 8)), (lambda x: x.narrow(1, 1, 4), range(1, 5)),
        (lambda x: x.chunk(3, 1)[1], range(3, 6)), (lambda x: x.split(3, 1)[2], range(6, 8)),
        (lambda x: x.split([1, 5, 2], 1)[-2], range(1, 6)), (lambda x: x[:, :, 1:], range(8)),
        (lambda x: x.select(2, 0), range(8)), (lambda x: x.unbind(2)[1], range(8)),
    ],
)  # fmt: skip
def test_the_map_of_a_part_is_right_on_numbers_and_leads_back(form: Form, kept: range) -> None:
    _, nodes, parts = parts_of(form)
    found = parts.part(nodes[-1], WHOLE, Direction.FORWARD)
    assert found is not None and found.index.tolist() == [7 - place for place in kept]
    assert torch.equal(form(scaled(X, WHOLE, SCALE)), scaled(form(X), found, SCALE))
    assert parts.whole(nodes[-1]) is nodes[0]
    back = parts.part(nodes[-1], found, Direction.BACKWARD)
    assert back is not None and back.axis == WHOLE.axis
    wanted = [7 - place if place in kept else -1 for place in range(8)]
    assert back.index.tolist() == wanted


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda x: x[:, 3], "are indexed away"),
        (lambda x: x[:, [0, 1]], "by a computed index"),
        (lambda x: x.tensor_split(2, 1)[0], "splits at computed positions"),
        (lambda x: x.max(1)[0], "takes one of several results"),
    ],
)
def test_a_part_whose_channels_are_not_known_is_declined(form: Form, reason: str) -> None:
    _, nodes, parts = parts_of(form)
    with pytest.raises(DeclinedError, match=reason):
        parts.part(nodes[-1], WHOLE, Direction.FORWARD)


def test_a_concatenation_names_its_parts_and_its_axis() -> None:
    _, nodes, parts = parts_of(lambda x: torch.cat((x, torch.relu(x)), 1))
    assert parts.join(nodes[-1]) == ([nodes[0], nodes[1]], -2)
    assert parts.join(nodes[1]) is None
