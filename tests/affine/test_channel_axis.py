"""Channels followed through what only moves data: the map at the other end is right on numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from rewrite.affine.channel_axis import Channels
from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.traits import call_of
from tests.affine.following import captured_of, check

X = torch.randn(2, 8, 4, 6, dtype=torch.float64)
Form = Callable[[Tensor], Tensor]


def follow(
    captured: Captured, node: Node, channel_map: ChannelMap, direction: Direction
) -> ChannelMap | None:
    call = call_of(captured, node)
    assert call is not None
    return Channels(captured, Ranks(captured)).follow(call, channel_map, direction)


MOVES: dict[str, Form] = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute from behind": lambda x: torch.permute(x, (0, -1, 1, -2)),
    "transpose": lambda x: x.transpose(1, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "moveaxis before": lambda x: x.moveaxis(3, 1),
    "unsqueeze before": lambda x: x.unsqueeze(1),
    "unsqueeze behind": lambda x: torch.unsqueeze(x, -1),
    "roll": lambda x: x.roll(3, 1),
    "roll two axes": lambda x: torch.roll(x, (1, 2), (1, 3)),
    "flip": lambda x: x.flip(1),
    "flip others": lambda x: torch.flip(x, (-1, -2)),
    "channel shuffle": lambda x: F.channel_shuffle(x, 4),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "flatten behind": lambda x: x.flatten(2),
    "flatten with": lambda x: torch.flatten(x, 1),
    "view": lambda x: x.view(2, 8, 24),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_map_followed_forth_and_back_is_right_and_the_same(name: str) -> None:
    check(MOVES[name], X, 1, follow)


def test_a_squeezed_axis_moves_the_others() -> None:
    check(lambda x: x.squeeze(2), X[:, :, :1], 1, follow)
    check(lambda x: torch.squeeze(x, (2, 3)), X[:, :, :1, :1], 1, follow)


def test_channels_that_a_pixel_shuffle_mixes_are_declined() -> None:
    captured, nodes = captured_of(lambda x: F.pixel_shuffle(x, 2), X)
    apart = ChannelMap(-3, torch.arange(8))
    with pytest.raises(DeclinedError, match="makes one channel of 4, and the norm maps those"):
        follow(captured, nodes[-1], apart, Direction.FORWARD)
    alike = follow(
        captured, nodes[-1], apart.moved(-3, torch.arange(2).repeat_interleave(4)),
        Direction.FORWARD,
    )  # fmt: skip
    assert alike is not None and alike.index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("form", "axis", "reason"),
    [
        (lambda x: x.flatten(0, 1), -3, "merge with its batch axis"),
        (lambda x: x.roll(1), -3, "moves the positions of all axes as one"),
    ],
)
def test_what_mixes_channels_is_declined(form: Form, axis: int, reason: str) -> None:
    captured, nodes = captured_of(form, X)
    with pytest.raises(DeclinedError, match=reason):
        follow(captured, nodes[-1], ChannelMap(axis, torch.arange(8)), Direction.FORWARD)


def test_another_kind_of_operation_is_not_followed_here() -> None:
    captured, nodes = captured_of(torch.relu, X)
    start = ChannelMap(-3, torch.arange(8))
    assert follow(captured, nodes[-1], start, Direction.FORWARD) is None
