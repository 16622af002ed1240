"""Where the channels of a norm lie in a value, followed through operations that only move data.

A `ChannelMap` says: position i of `axis` carries channel index[i] of the norm (-1: none of them).

    permute, squeeze   the axis has another number
    pixel shuffle      r*r neighbouring channels become one, or the other way round
    roll, flip         the positions of the axis in another order

Each is followed both ways. A way that would need two maps for one channel is declined. Axes that
merge stand in `rewrite.affine.merged_axes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.channel_map import (
    UNKNOWN_RANK,
    ChannelMap,
    DeclinedError,
    Direction,
    from_front,
)
from rewrite.affine.merged_axes import MergedAxes
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.traits import Call

Follow = Callable[[Call, Node, ChannelMap, Direction], ChannelMap]


class Channels:
    """Follows channel maps through the operations of one captured model that only move data."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._ranks = ranks
        self._merged = MergedAxes(captured, ranks)
        self._follow: dict[str, Follow] = {
            "flatten": self._flatten,
            "permute": self._permute,
            "transpose": self._transpose,
            "t": self._transpose,
            "movedim": self._movedim,
            "pixel_shuffle": _pixel_shuffle,
            "pixel_unshuffle": _pixel_shuffle,
            "channel_shuffle": self._channel_shuffle,
            "unsqueeze": self._unsqueeze,
            "squeeze": self._squeeze,
            "roll": self._reorder,
            "flip": self._reorder,
            "view": self._merged.view,
            "reshape_as": self._merged.view,
            "unflatten": self._merged.view,
        }

    def follow(
        self, call: Call, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap | None:
        """Return the map at the input of a call (backward) or at its value; None: not my kind.

        Raises:
            DeclinedError: the operation mixes channels, or needs sizes that are unknown.
        """
        follow = self._follow.get(call.name)
        if follow is None or not isinstance(call.operand, Node):
            return None
        return follow(call, call.operand, channel_map, direction)

    def _rank(self, source: Node) -> int:
        rank = self._ranks.rank(source)
        if rank is None:
            raise DeclinedError(UNKNOWN_RANK.format(source.name), source)
        return rank

    def _flatten(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        start, end = call.get("start_dim", 0), call.get("end_dim", -1)
        _check_axes(call, start, end)
        return self._merged.flatten(source, channel_map, direction, start, end)

    # -- the order of the axes ----------------------------------------------------------------

    def _permute(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        dims = call.get("dims") or ()
        _check_axes(call, *dims)
        return _reordered(channel_map, [dim % len(dims) for dim in dims], direction)

    def _transpose(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        rank = self._rank(source)
        one, other = call.get("dim0", 0), call.get("dim1", 1)
        _check_axes(call, one, other)
        order = list(range(rank))
        if rank > 1:
            order[one % rank], order[other % rank] = order[other % rank], order[one % rank]
        return _reordered(channel_map, order, direction)

    def _movedim(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        rank = self._rank(source)
        moved, to = call.get("source"), call.get("destination")
        _check_axes(call, moved, to)
        order = [axis for axis in range(rank) if axis != moved % rank]
        order.insert(to % rank, moved % rank)
        return _reordered(channel_map, order, direction)

    def _unsqueeze(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        rank = self._rank(source)
        dim = call.get("dim")
        _check_axes(call, dim)
        new = dim % (rank + 1)
        if direction is Direction.BACKWARD:
            axis = from_front(channel_map.axis, rank + 1)
            if axis == new:
                raise DeclinedError(f"the channels are an axis that {source.name} does not have")
            return channel_map.moved((axis - (axis > new)) - rank)
        axis = from_front(channel_map.axis, rank)
        return channel_map.moved((axis + (axis >= new)) - (rank + 1))

    def _squeeze(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        rank = self._rank(source)
        dims = call.get("dim") or ()
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        _check_axes(call, *dims)
        if not dims:
            raise DeclinedError(UNKNOWN_RANK.format(call.node.name), call.node)
        gone = {dim % rank for dim in dims}
        if any(self._ranks.size(source, dim - rank) != 1 for dim in gone):
            raise DeclinedError(
                f"whether {source.name} loses an axis is unknown (pass example_inputs)", call.node
            )
        kept = [axis for axis in range(rank) if axis not in gone]
        if direction is Direction.BACKWARD:
            return channel_map.moved(kept[from_front(channel_map.axis, len(kept))] - rank)
        axis = from_front(channel_map.axis, rank)
        if axis in gone:
            raise DeclinedError(f"the channels of {source.name} are squeezed away", call.node)
        return channel_map.moved(kept.index(axis) - len(kept))

    # -- the order of the positions -----------------------------------------------------------

    def _reorder(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        """Follow a roll or a flip, along the channels too."""
        rank = self._rank(source)
        dims, shifts = call.get("dims"), call.get("shifts", 0)
        dims = (dims,) if isinstance(dims, int) else dims or ()
        shifts = (shifts,) * len(dims) if isinstance(shifts, int) else shifts
        _check_axes(call, *dims, *shifts)
        if not dims:
            raise DeclinedError(f"{call.node.name} moves the positions of all axes as one")
        index = channel_map.index
        for dim, shift in zip(dims, shifts, strict=True):
            if dim % rank == from_front(channel_map.axis, rank):
                _check_known(call, channel_map)
                sign = -1 if direction is Direction.BACKWARD else 1
                index = index.flip(0) if call.name == "flip" else index.roll(sign * shift)
        return channel_map.moved(channel_map.axis, index)

    def _channel_shuffle(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        groups = call.get("groups")
        _check_axes(call, groups)
        if from_front(channel_map.axis, self._rank(source)) != 1:
            return channel_map
        _check_known(call, channel_map)
        rows = groups if direction is Direction.FORWARD else len(channel_map.index) // groups
        return channel_map.moved(channel_map.axis, channel_map.index.view(rows, -1).t().flatten())


def _reordered(channel_map: ChannelMap, order: list[int], direction: Direction) -> ChannelMap:
    """Return a map behind axes in another order: axis k of the value is `order[k]` of the input."""
    axis = from_front(channel_map.axis, len(order))
    backward = direction is Direction.BACKWARD
    return channel_map.moved((order[axis] if backward else order.index(axis)) - len(order))


def _check_axes(call: Call, *given: Any) -> None:
    """Decline an operation whose axes or sizes are computed, or left out."""
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        raise DeclinedError(f"the axes that {call.node.name} moves are computed", call.node)


def _check_known(call: Call, channel_map: ChannelMap) -> None:
    if channel_map.spread:
        raise DeclinedError(f"{call.node.name} moves channels of unknown places", call.node)


def _pixel_shuffle(
    call: Call, source: Node, channel_map: ChannelMap, direction: Direction
) -> ChannelMap:
    """Follow a pixel shuffle: r*r neighbouring channels become the pixels of one; or back."""
    shuffles = call.name == "pixel_shuffle"
    factor = call.get("upscale_factor" if shuffles else "downscale_factor")
    _check_axes(call, factor)
    size = factor**2
    if channel_map.axis != -3:
        raise DeclinedError(
            "the channels are not the axis that a pixel shuffle takes apart", call.node
        )
    if shuffles == (direction is Direction.BACKWARD):
        return channel_map.moved(-3, channel_map.index.repeat_interleave(size))
    if len(channel_map.index) % size:
        raise DeclinedError("the channels do not fill the pixels of a pixel shuffle", call.node)
    index: Tensor = channel_map.index.view(-1, size)
    if not torch.equal(index, index[:, :1].expand_as(index)):
        raise DeclinedError(
            f"a pixel shuffle makes one channel of {size}, and the norm maps those differently",
            call.node,
        )
    return channel_map.moved(-3, index[:, 0].contiguous())


def diagonal_axis(node: Node, operand: Node, value: Tensor, place: int) -> int | None:
    """Return the axis, from the end, that an einsum scales by the axis `place` of a constant.

    None where it is no such product: "nchw,c->nchw" is one, "nchw,c->nhw" sums over the channels.
    """
    equation, *given = node.args
    operands = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not arrow or len(labels) != 2:
        return None
    ours, theirs = labels if operands[0] is operand else reversed(labels)
    letters = ours.replace("...", "")
    if ours != output or len(set(letters)) < len(letters) or len(theirs) != value.dim():
        return None
    label = theirs[place]
    if not set(theirs) <= set(letters) or len(set(theirs)) < len(theirs) or label not in letters:
        return None
    behind = ours.partition(label)[2]
    return None if "..." in behind else -1 - len(behind)
