"""Channels that are taken apart and put together: slices, chunks, splits and concatenations.

slices, chunk      a part of the index; the rest of the source carries nothing
cat                the parts one behind the other
"""

from __future__ import annotations

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
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import is_getitem
from rewrite.graph.traits import Call, Trait, call_of, has, named

_INDEXING = ("select", "narrow", "slice")


class Parts:
    """Follows channel maps into parts of values, and into what is made of parts."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._captured = captured
        self._ranks = ranks

    def whole(self, node: Node) -> Node:
        """Return the value that `node`, an indexing or one result of a split, takes a part of."""
        source = node.args[0]
        assert isinstance(source, Node)
        if is_getitem(node) and has(source, Trait.SPLITS):
            return self._split_of(source)[1]
        return source

    def _split_of(self, source: Node) -> tuple[Call, Node]:
        call = call_of(self._captured, source)
        if call is None or not isinstance(call.operand, Node):
            raise DeclinedError(f"{source.name} splits no value", source)
        return call, call.operand

    def part(self, node: Node, channel_map: ChannelMap, direction: Direction) -> ChannelMap | None:
        """Follow an indexing or one result of a chunk or split; None if `node` is neither.

        Raises:
            DeclinedError: what it takes is computed, or is no part of one value.
        """
        if named(node, *_INDEXING):
            return self._indexing(node, channel_map, direction)
        if not is_getitem(node) or not isinstance(node.args[0], Node):
            return None
        source, item = node.args[0], node.args[1]
        if has(source, Trait.SPLITS):
            if not isinstance(item, int):
                raise DeclinedError(f"{node.name} takes several parts of {source.name}", node)
            return self._result(*self._split_of(source), item, channel_map, direction)
        if not self._is_tensor(source):
            raise DeclinedError(f"{node.name} takes one of several results of {source.name}", node)
        items = item if isinstance(item, tuple) else (item,)
        if any(isinstance(i, Node | list | Tensor | bool) for i in items):
            raise DeclinedError(f"{node.name} indexes {source.name} by a computed index", node)
        return self._slice(source, items, channel_map, direction)

    def _is_tensor(self, source: Node) -> bool:
        held = source.meta.get("val")
        call = call_of(self._captured, source)
        several = call is not None and (
            call.get("return_indices", False)
            or call.name in ("max", "min")
            or "with_indices" in call.name
        )
        return isinstance(held, Tensor) or (held is None and not several)

    def _indexing(self, node: Node, channel_map: ChannelMap, direction: Direction) -> ChannelMap:
        """Follow `select`, `narrow` and `slice` as the indexing that they are."""
        call = call_of(self._captured, node)
        source = None if call is None else call.operand
        if call is None or not isinstance(source, Node):
            raise DeclinedError(f"{node.name} indexes no value", node)
        rank = self._ranks.rank(source)
        dim = call.get("dim", 0)
        if call.name == "select":
            item: Any = call.get("index")
        elif call.name == "narrow":
            start, length = call.get("start"), call.get("length")
            known = isinstance(start, int) and isinstance(length, int) and start >= 0
            item = slice(start, start + length) if known else None
        else:
            bounds = (call.get("start"), call.get("end"), call.get("step"))
            known = all(bound is None or isinstance(bound, int) for bound in bounds)
            item = slice(*bounds) if known else None
        if not isinstance(dim, int) or not isinstance(item, int | slice) or rank is None:
            raise DeclinedError(f"{node.name} indexes {source.name} by a computed index", node)
        items = (*(slice(None),) * (dim % rank), item)
        return self._slice(source, items, channel_map, direction)

    def _result(
        self, call: Call, whole: Node, item: int, channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        """Follow the result number `item` of a chunk, split or unbind."""
        source = call.node
        dim = call.get("dim", 0)
        if not isinstance(dim, int):
            raise DeclinedError(f"{source.name} splits along a computed axis", source)
        if call.name == "unbind":
            rank = self._ranks.rank(whole)
            if rank is None:
                raise DeclinedError(UNKNOWN_RANK.format(whole.name), source)
            return self._slice(
                whole, (*(slice(None),) * (dim % rank), item), channel_map, direction
            )
        axis = self._ranks.from_end(whole, dim)
        if axis != channel_map.axis:
            if (axis < 0) != (channel_map.axis < 0):
                raise DeclinedError(UNKNOWN_RANK.format(whole.name), source)
            return channel_map
        total = self._ranks.size(whole, axis)
        if total is None or channel_map.spread:
            raise DeclinedError(
                f"the number of channels of {whole.name} is unknown (pass example_inputs)", source
            )
        start, stop = _bounds(call, total, item)
        if len(channel_map.index) != (stop - start if direction is Direction.BACKWARD else total):
            raise DeclinedError(f"another number of channels of {whole.name} is mapped", source)
        if direction is Direction.BACKWARD:
            index = torch.full((total,), -1)
            index[start:stop] = channel_map.index
            return channel_map.moved(axis, index)
        return channel_map.moved(axis, channel_map.index[start:stop])

    def _slice(
        self, source: Node, items: tuple[Any, ...], channel_map: ChannelMap, direction: Direction
    ) -> ChannelMap:
        rank = self._ranks.rank(source)
        backward = direction is Direction.BACKWARD
        if rank is None:
            raise DeclinedError(UNKNOWN_RANK.format(source.name))
        if Ellipsis in items:
            at = items.index(Ellipsis)
            used = sum(i is not None for i in items) - 1
            items = (*items[:at], *(slice(None),) * (rank - used), *items[at + 1 :])
        items = (*items, *(slice(None),) * (rank - sum(i is not None for i in items)))
        place = 0
        out_axes: list[int | None] = []
        for item in items:
            if item is None:
                out_axes.append(None)
                continue
            if not isinstance(item, int):
                out_axes.append(place)
            place += 1
        axis = from_front(channel_map.axis, len(out_axes) if backward else rank)
        input_axis = out_axes[axis] if backward else axis
        if input_axis is None or input_axis not in out_axes:
            raise DeclinedError(f"the channels of {source.name} are indexed away")
        window = [item for item in items if item is not None][input_axis]
        if channel_map.spread and window != slice(None):
            raise DeclinedError(f"the number of channels of {source.name} is unknown")
        if window == slice(None):
            length = len(channel_map.index)
        else:
            size = self._ranks.size(source, input_axis - rank)
            if size is None:
                raise DeclinedError(f"the number of channels of {source.name} is unknown")
            length = size
        positions = torch.arange(length)[window]
        if len(channel_map.index) != (len(positions) if backward else length):
            raise DeclinedError(f"another number of channels of {source.name} is mapped", source)
        if backward:
            index = torch.full((length,), -1)
            index[positions] = channel_map.index
            return channel_map.moved(input_axis - rank, index)
        return channel_map.moved(
            out_axes.index(input_axis) - len(out_axes), channel_map.index[positions]
        )

    def join(self, node: Node) -> tuple[list[Node], int] | None:
        """Return the parts of a concatenation and its axis, or None if `node` is none.

        Raises:
            DeclinedError: its parts or its axis are computed.
        """
        if (found := self._ranks.concatenated(node)) is None:
            return None
        parts, dim = found
        if not isinstance(parts, list | tuple) or not isinstance(dim, int):
            raise DeclinedError(f"{node.name} concatenates what is computed", node)
        if not all(isinstance(part, Node) for part in parts):
            raise DeclinedError(f"{node.name} concatenates something that is no value", node)
        return list(parts), self._ranks.from_end(node, dim)


def _bounds(call: Call, total: int, item: int) -> tuple[int, int]:
    """Return which positions the result `item` of a chunk or split covers."""
    computed = DeclinedError(f"{call.node.name} splits at computed positions", call.node)
    if call.name == "tensor_split":
        raise computed
    given = call.get("chunks" if call.name == "chunk" else "split_size")
    if isinstance(given, int):
        step = given if call.name == "split" else -(-total // given)
        sizes = [min(step, total - start) for start in range(0, total, step)]
    elif isinstance(given, list | tuple) and all(isinstance(size, int) for size in given):
        sizes = [int(size) for size in given]
    else:
        raise computed
    item %= len(sizes)
    return sum(sizes[:item]), sum(sizes[: item + 1])
