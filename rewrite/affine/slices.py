"""Channels that are taken apart and put together: slices, chunks, splits and concatenations.

slices, chunk      a part of the index; the rest of the source carries nothing
cat                the parts one behind the other
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.channel_map import UNKNOWN_RANK, ChannelMap, Refused, from_front
from rewrite.graph.arguments import argument
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import function_name, is_getitem


class Parts:
    """Follows lanes into parts of values, and into what is made of parts."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def part(self, node: Node, lane: ChannelMap, backward: bool) -> ChannelMap | None:
        """Follow an indexing or one result of a chunk or split; None if `node` is neither."""
        if not is_getitem(node) or not isinstance(node.args[0], Node):
            return None
        source, item = node.args[0], node.args[1]
        called = function_name(source)
        if called in ("chunk", "split", "tensor_split") and isinstance(item, int):
            return self._chunk(source, item, lane, backward)
        items = item if isinstance(item, tuple) else (item,)
        if any(isinstance(i, Node | list | Tensor) for i in items):
            raise Refused(f"{node.name} indexes {source.name} by a computed index")
        return self._slice(source, items, lane, backward)

    def _chunk(self, source: Node, item: int, lane: ChannelMap, backward: bool) -> ChannelMap:
        whole = source.args[0]
        assert isinstance(whole, Node)
        dim = argument(source, 2, "dim", 0)
        if not isinstance(dim, int):
            raise Refused(f"{source.name} splits along a computed axis")
        axis = self._ranks.from_end(whole, dim)
        if axis != lane.axis:
            if (axis < 0) != (lane.axis < 0):
                raise Refused(UNKNOWN_RANK.format(whole.name))
            return lane
        total = self._ranks.size(whole, axis)
        if total is None:
            raise Refused(
                f"the number of channels of {whole.name} is unknown (pass example_inputs)"
            )
        start, stop = _bounds(source, total, item)
        if backward:
            index = torch.full((total,), -1)
            index[start:stop] = lane.index
            return lane.moved(axis, index)
        return lane.moved(axis, lane.index[start:stop])

    def _slice(
        self, source: Node, items: tuple[Any, ...], lane: ChannelMap, backward: bool
    ) -> ChannelMap:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(UNKNOWN_RANK.format(source.name))
        if Ellipsis in items:
            at = items.index(Ellipsis)
            used = sum(i is not None for i in items) - 1
            items = (*items[:at], *(slice(None),) * (rank - used), *items[at + 1 :])
        items = (*items, *(slice(None),) * (rank - sum(i is not None for i in items)))
        in_axis = 0
        out_axes: list[int | None] = []
        for item in items:
            if item is None:
                out_axes.append(None)
                continue
            if not isinstance(item, int):
                out_axes.append(in_axis)
            in_axis += 1
        axis = from_front(lane.axis, len(out_axes) if backward else rank)
        in_front = out_axes[axis] if backward else axis
        if in_front is None or in_front not in out_axes:
            raise Refused(f"the channels of {source.name} are indexed away")
        window = [item for item in items if item is not None][in_front]
        if window == slice(None):
            length = len(lane.index)
        else:
            size = self._ranks.size(source, in_front - rank)
            if size is None:
                raise Refused(f"the number of channels of {source.name} is unknown")
            length = size
        positions = torch.arange(length)[window]
        if backward:
            index = torch.full((length,), -1)
            index[positions] = lane.index
            return lane.moved(in_front - rank, index)
        return lane.moved(out_axes.index(in_front) - len(out_axes), lane.index[positions])

    def join(self, node: Node) -> tuple[list[Node], int] | None:
        """Return the parts of a concatenation and its axis, or None if `node` is none."""
        if function_name(node) not in ("cat", "concat", "concatenate"):
            return None
        parts = argument(node, 0, "tensors")
        dim = argument(node, 1, "dim", argument(node, 1, "axis", 0))
        if not isinstance(parts, list | tuple) or not isinstance(dim, int):
            raise Refused(f"{node.name} concatenates what is computed")
        if not all(isinstance(part, Node) for part in parts):
            raise Refused(f"{node.name} concatenates something that is no value")
        return list(parts), self._ranks.from_end(node, dim)


def _bounds(source: Node, total: int, item: int) -> tuple[int, int]:
    """Return which positions the result `item` of a chunk or split covers."""
    given = source.args[1] if len(source.args) > 1 else next(
        (source.kwargs[k] for k in ("chunks", "split_size_or_sections", "split_size")
         if k in source.kwargs), None,
    )  # fmt: skip
    called = function_name(source)
    if isinstance(given, int) and called != "tensor_split":
        step = given if called == "split" else -(-total // given)
        sizes = [min(step, total - start) for start in range(0, total, step)]
    elif isinstance(given, list | tuple) and called == "split":
        if not all(isinstance(size, int) for size in given):
            raise Refused(f"{source.name} splits at computed positions")
        sizes = [int(size) for size in given]
    else:
        raise Refused(f"{source.name} splits at computed positions")
    item %= len(sizes)
    return sum(sizes[:item]), sum(sizes[: item + 1])
