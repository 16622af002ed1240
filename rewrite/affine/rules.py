"""What one operation demands of the values around it when one of them changes by an affine map.

    v = s.v' + t  for a value v; then for an operation that does nothing but

    pass on      y = x                           y and x change alike
    average      y = sum_k a_k x_k, sum a_k = 1  alike; where sum a_k != 1: only by s
    add          y = a x + b z                   s: all three; t: y and one of x, z
    multiply     y = x * z                       s: y and one of x, z
    rectify      y = max(x, a.x)                 s > 0: alike; t: never
    maximum      y = max_k x_k                   s > 0 and any t: alike
    join         y = [x, z]                      each its own part

`PropagationRules.around` returns the channel map of every value that has to change with a given
one. What an operation is stands in `rewrite.graph.traits`.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from rewrite.affine.channel_axis import Channels
from rewrite.affine.channel_map import UNKNOWN_RANK, ChannelMap, DeclinedError, Direction
from rewrite.affine.laws import Constraints, UnaryLaws, called
from rewrite.affine.operands import OperandRules
from rewrite.affine.slices import Parts
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import is_getitem
from rewrite.graph.traits import Trait, call_of, has, named, operation

_ABOUT_SHAPE = ("shape", "dtype", "device", "ndim", "is_cuda", "is_nested", "requires_grad")


def asks_for_its_form(node: Node) -> bool:
    """Return whether `node` reads an attribute of a value that says nothing of its numbers."""
    return named(node, "getattr") and node.args[1] in _ABOUT_SHAPE


class PropagationRules:
    """The operations of one captured model, as demands on channel maps.

    `folded` are nodes (norms, multiplications by a constant) whose map has moved elsewhere, and the
    input that they pass on.
    """

    def __init__(self, captured: Captured, ranks: Ranks, folded: dict[Node, Node]) -> None:
        self._captured = captured
        self._ranks = ranks
        self._folded = folded
        self._channels = Channels(captured, ranks)
        self._parts = Parts(captured, ranks)
        self._laws = UnaryLaws(captured, ranks)
        self._operands = OperandRules(captured, ranks)

    def called(self, node: Node) -> str:
        """Return a call in words: "act1 (ReLU)", "add in layer1.0"."""
        return called(self._captured, node)

    def reads_only_shape(self, node: Node, value: Node) -> bool:
        """Return whether `node` asks `value` for its shape, dtype or device and nothing else."""
        row = operation(node)
        if row is None:
            return False
        places = [place for place, given in enumerate(node.args) if given is value]
        if len(places) + sum(given is value for given in node.kwargs.values()) != 1:
            return False
        first = places == [0] or node.kwargs.get("input") is value
        if row.name == "getattr":
            return first and asks_for_its_form(node)
        if Trait.ASKS in row.traits:
            return first
        return bool(row.traits & (Trait.LIKE_SECOND | Trait.CASTS)) and not first

    def around(
        self, node: Node, value: Node, channel_map: ChannelMap, constraints: Constraints
    ) -> dict[Node, ChannelMap]:
        """Return the maps that `node` demands of its inputs and value, given one of them.

        Raises:
            DeclinedError: no map of the other values makes up for the change.
        """
        backward = value is node
        direction = Direction.BACKWARD if backward else Direction.FORWARD
        if node in self._folded:
            return {self._folded[node] if backward else node: channel_map}
        joined = self._parts.join(node)
        if joined is not None:
            return self._join(node, value, channel_map, *joined)
        if has(node, Trait.SPLITS) and not backward:
            return self._split(node, channel_map)
        part = self._parts.part(node, channel_map, direction)
        if part is not None:
            return {self._parts.whole(node) if backward else node: part}
        call = call_of(self._captured, node)
        if call is None:
            raise DeclinedError(
                f"{self.called(node)} is not an operation that is known to commute with a map per "
                "channel",
                node,
            )
        followed = self._channels.follow(call, channel_map, direction)
        if followed is not None:
            return {call.operand if backward else node: followed}
        if call.operation.traits & Trait.ADDS or call.name in ("mul", "div"):
            return self._operands.around(call, value, channel_map, constraints)
        return self._laws.around(call, value, channel_map, constraints)

    # -- joining and parting ------------------------------------------------------------------

    def _join(
        self, node: Node, value: Node, channel_map: ChannelMap, parts: list[Node], axis: int
    ) -> dict[Node, ChannelMap]:
        if (axis < 0) != (channel_map.axis < 0):
            raise DeclinedError(UNKNOWN_RANK.format(node.name), node)
        if axis != channel_map.axis:
            return {node: channel_map, **dict.fromkeys(parts, channel_map)}
        sizes = [self._ranks.size(part, axis) for part in parts]
        if None in sizes:
            unknown = parts[sizes.index(None)]
            raise DeclinedError(
                f"the number of channels of {unknown.name}, a part of {node.name}, is unknown "
                "without example inputs (pass example_inputs)",
                node,
            )
        demands: dict[Node, ChannelMap] = {}
        if value is not node:
            pieces = [
                channel_map.index if part is value else channel_map.index.new_full((size or 0,), -1)
                for part, size in zip(parts, sizes, strict=True)
            ]
            whole = channel_map.moved(axis, torch.cat(pieces))
        else:
            whole = channel_map
        lengths = [size for size in sizes if size is not None]
        if sum(lengths) != len(whole.index):
            raise DeclinedError(
                f"{node.name} has {sum(lengths)} channels where {len(whole.index)} are mapped", node
            )
        for part, index in zip(parts, torch.split(whole.index, lengths), strict=True):
            piece = whole.moved(axis, index)
            if part in demands and not demands[part].same(piece):
                raise DeclinedError(f"{node.name} holds {part.name} twice", node)
            demands[part] = piece
        return {node: whole, **demands}

    def _split(self, node: Node, channel_map: ChannelMap) -> dict[Node, ChannelMap]:
        demands: dict[Node, ChannelMap] = {}
        for user in node.users:
            part = (
                self._parts.part(user, channel_map, Direction.FORWARD) if is_getitem(user) else None
            )
            if part is None:
                raise DeclinedError(f"{self.called(user)} reads all parts of {node.name}", user)
            demands[user] = part
        return demands
