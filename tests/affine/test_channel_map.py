"""A channel map: which axis, which channel at each position, which part of the map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewrite.affine.channel_map import ChannelMap, DeclinedError, from_front

MAP = ChannelMap(-3, torch.tensor([0, 2, 1]))


def test_two_maps_are_the_same_in_every_part_or_not() -> None:
    assert MAP.same(ChannelMap(-3, torch.tensor([0, 2, 1])))
    others = (
        MAP.moved(-2), MAP.moved(-3, torch.tensor([0, 1, 2])), replace(MAP, scale=False),
        replace(MAP, shift=False), replace(MAP, spread=True),
    )  # fmt: skip
    assert not any(MAP.same(other) for other in others)


def test_a_map_of_no_channel_or_of_no_part_does_nothing() -> None:
    assert not MAP.trivial and not replace(MAP, scale=False).trivial
    assert replace(MAP, scale=False, shift=False).trivial
    assert MAP.moved(-3, torch.tensor([-1, -1])).trivial
    assert MAP.moved(-3, torch.empty(0, dtype=torch.int64)).trivial


def test_moved_keeps_what_it_does_not_name() -> None:
    moved = replace(MAP, shift=False, spread=True).moved(-1)
    assert (moved.axis, moved.shift, moved.spread) == (-1, False, True)
    assert moved.index is MAP.index


def test_an_axis_counts_from_the_front_if_the_value_has_it() -> None:
    assert [from_front(axis, 4) for axis in (-4, -1, 0, 3)] == [0, 3, 0, 3]
    for axis in (-5, 4):
        with pytest.raises(DeclinedError, match="an axis that the value does not have"):
            from_front(axis, 4)
