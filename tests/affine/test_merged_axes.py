"""Axes that become one, and back: channels are repeated, and only alike ones lead back."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.merged_axes import MergedAxes
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from tests.affine.following import captured_of, check

X = torch.randn(2, 3, 4, 5, dtype=torch.float64)


def flattened(start: int, end: int):
    def follow(
        captured: Captured, node: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        source = node.all_input_nodes[0]
        merged = MergedAxes(captured, Ranks(captured))
        return merged.flatten(source, channel_map, direction, start, end)

    return follow


@pytest.mark.parametrize(
    ("start", "end", "axis"), [(1, 3, 1), (1, 2, 1), (2, 3, 1), (1, 2, 3), (0, 1, 3)]
)
def test_merged_channels_are_right_on_numbers_and_lead_back(
    start: int, end: int, axis: int
) -> None:
    check(lambda x: x.flatten(start, end), X, axis, flattened(start, end))


def test_channels_behind_another_axis_are_repeated_as_a_whole() -> None:
    captured, nodes = captured_of(lambda x: x.flatten(1), X)
    given = ChannelMap(-2, torch.arange(4))
    found = flattened(1, 3)(captured, nodes[-1], given, Direction.FORWARD)
    # x is (3, 4, 5) a sample: each channel five times in a row, all three times
    assert found.index.tolist() == [place // 5 % 4 for place in range(60)]


def test_what_one_channel_became_has_to_be_mapped_alike_to_lead_back() -> None:
    captured, nodes = captured_of(lambda x: x.flatten(1), X)
    follow = flattened(1, 3)
    apart = ChannelMap(-1, torch.arange(60))
    with pytest.raises(DeclinedError, match="along 3 axes, not per channel"):
        follow(captured, nodes[-1], apart, Direction.BACKWARD)
    alike = follow(
        captured, nodes[-1], ChannelMap(-1, torch.arange(3).repeat_interleave(20)),
        Direction.BACKWARD,
    )  # fmt: skip
    assert (alike.axis, alike.index.tolist()) == (-3, [0, 1, 2])


@pytest.mark.parametrize("direction", Direction)
def test_channels_that_merge_with_the_batch_are_declined(direction: Direction) -> None:
    captured, nodes = captured_of(lambda x: x.flatten(0, 1), X)
    with pytest.raises(DeclinedError, match="batch axis"):
        flattened(0, 1)(captured, nodes[-1], ChannelMap(-3, torch.arange(6)), direction)
