"""Axes that become one, and one that becomes several: flatten, view, reshape, unflatten.

    y[.., i n + j, ..] = x[.., i, j, ..]     n: the length of the second axis

Channels that merge with an axis behind them are repeated, each n times in a row; those that merge
with one before them are repeated as a whole. The way back needs all that one channel became to be
mapped alike.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from rewrite.affine.channel_map import UNKNOWN_RANK, DeclinedError, Direction, from_front
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import is_getitem
from rewrite.graph.traits import Call, named

if TYPE_CHECKING:
    from torch import Tensor

    from rewrite.affine.channel_map import ChannelMap


class MergedAxes:
    """Follows channel maps through flattens and views."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._captured = captured
        self._ranks = ranks

    def flatten(
        self, source: Node, channel_map: ChannelMap, direction: Direction, start: int, end: int
    ) -> ChannelMap:
        """Follow the axes `start` to `end`, which become one.

        Raises:
            DeclinedError: the rank is unknown, or the channels do not stay apart.
        """
        backward = direction is Direction.BACKWARD
        rank = self._ranks.rank(source)
        if rank is None:
            raise DeclinedError(UNKNOWN_RANK.format(source.name))
        first, last = start % rank, end % rank
        flat_rank = rank - (last - first)
        if backward:
            axis = from_front(channel_map.axis, flat_rank)
            if axis < first:
                return channel_map.moved(axis - rank)
            if axis > first:
                return channel_map.moved(axis + (last - first) - rank)
            return self._unmerge(source, channel_map, first, last, rank)
        axis = from_front(channel_map.axis, rank)
        if axis < first:
            return channel_map.moved(axis - flat_rank)
        if axis > last:
            return channel_map.moved(axis - (last - first) - flat_rank)
        return self._merge(source, channel_map, axis, first, last, rank, flat_rank)

    def _merge(
        self,
        source: Node,
        channel_map: ChannelMap,
        axis: int,
        first: int,
        last: int,
        rank: int,
        flat_rank: int,
    ) -> ChannelMap:
        before = self._product(source, range(first, axis), rank)
        after = self._product(source, range(axis + 1, last + 1), rank)
        if before is None:
            raise DeclinedError(
                f"the channels of {source.name} merge behind an axis of unknown length"
            )
        if before == 0 or (first == 0 and axis > 0):
            raise DeclinedError(f"the channels of {source.name} merge with its batch axis")
        index = channel_map.index.repeat(before)
        if after is None:
            if before != 1:
                raise DeclinedError(
                    f"the channels of {source.name} merge with axes of unknown length"
                )
            return replace(channel_map.moved(first - flat_rank, index), spread=True)
        return channel_map.moved(first - flat_rank, index.repeat_interleave(after))

    def _unmerge(
        self, source: Node, channel_map: ChannelMap, first: int, last: int, rank: int
    ) -> ChannelMap:
        """Find the one axis of `first` to `last` that carries channels, behind a flatten."""
        if channel_map.spread:
            raise DeclinedError(f"the channels of {source.name} are merged twice")
        length = len(channel_map.index)
        # The usual case: the channels are the first of the merged axes.
        channels = self._ranks.size(source, first - rank)
        shape = self._captured.shape(source)
        if first == 0:
            raise DeclinedError(f"the batch axis of {source.name} is merged into the channels")
        if channels is not None and channels and length % channels == 0:
            index = channel_map.index.view(channels, -1)
            if bool((index == index[:, :1]).all()):
                return channel_map.moved(first - rank, index[:, 0].contiguous())
        if shape is not None:
            labels = channel_map.index.view(tuple(shape[first : last + 1]))
            return self._only_axis(source, channel_map, labels, first - rank)
        if channels is None:
            raise DeclinedError(
                f"the number of channels of {source.name} is unknown before the flatten"
            )
        raise DeclinedError(
            f"each channel of {source.name} spreads over {length // channels} features, and the "
            "norm maps each of those differently"
        )

    def _only_axis(
        self, source: Node, channel_map: ChannelMap, labels: Tensor, first: int
    ) -> ChannelMap:
        """Return the map on the only axis along which `labels` vary; their first is `first`."""
        varying = [
            axis
            for axis in range(labels.dim())
            if labels.shape[axis] > 1 and not bool((labels == labels.narrow(axis, 0, 1)).all())
        ]
        if len(varying) > 1:
            raise DeclinedError(
                f"the norm maps the positions of {source.name} differently along "
                f"{len(varying)} axes, not per channel"
            )
        kept = varying[0] if varying else 0
        index = labels.movedim(kept, 0).reshape(labels.shape[kept], -1)[:, 0].contiguous()
        return channel_map.moved(first + kept, index)

    def view(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        """Follow a view into another shape, by the shapes of the example inputs.

        Raises:
            DeclinedError: the shapes are unknown, or the view mixes the channels with another axis.
        """
        node = call.node
        backward = direction is Direction.BACKWARD
        if any(isinstance(given, torch.dtype) for given in (*node.args, *node.kwargs.values())):
            raise DeclinedError(f"{node.name} reads the bits of {source.name} as another dtype")
        if _flattens_from_one(call, source):
            return self.flatten(source, channel_map, direction, 1, -1)
        old, new = self._captured.shape(source), self._captured.shape(node)
        if old is None or new is None:
            raise DeclinedError(
                f"how {node.name} views {source.name} is unknown without example inputs "
                "(pass example_inputs)"
            )
        given, wanted = (new, old) if backward else (old, new)
        axis = from_front(channel_map.axis, len(given))
        if channel_map.spread:
            raise DeclinedError(f"the channels of {source.name} are merged twice")
        trailing = len(given) - axis
        if len(wanted) >= trailing and tuple(given[axis:]) == tuple(wanted[-trailing:]):
            return channel_map.moved(-trailing)
        if axis == 0 or given[0] != wanted[0]:
            raise DeclinedError(f"the view {node.name} mixes the channels with the batch axis")
        labels = channel_map.index.view(-1, *(1,) * (len(given) - axis - 1)).expand(
            tuple(given[1:])
        )
        return self._only_axis(
            source, channel_map, labels.reshape(tuple(wanted[1:])), 1 - len(wanted)
        )

    def _product(self, source: Node, axes: range, rank: int) -> int | None:
        sizes = [self._ranks.size(source, axis - rank) for axis in axes]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _flattens_from_one(call: Call, source: Node) -> bool:
    """Return whether a view is `x.view(x.size(0), -1)` in one of its spellings."""
    sizes = call.get("shape") if call.name == "view" else None
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or sizes[1] != -1:
        return False
    return _is_batch_size(sizes[0], source)


def _is_batch_size(size: Any, source: Node) -> bool:
    if not isinstance(size, Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return size.args[0] is source and size.args[1:] == (0,)
    if is_getitem(size) and size.args[1] == 0:
        shape = size.args[0]
        if not isinstance(shape, Node):
            return False
        if shape.op == "call_method" and shape.target == "size":
            return shape.args == (source,)
        return named(shape, "getattr") and shape.args == (source, "shape")
    return False
