"""One attempt to absorb a map: the values that change, until layers absorb the change.

    backward    x' = s.x + t takes the place of x: what produces x absorbs (s, t)
    forward     y' = x takes the place of y = s.y' + t: what reads y absorbs (s, t)

Every operation next to a changed value says which other values have to change with it
(`rewrite.affine.rules`); a layer ends the propagation by absorbing the map
(`rewrite.affine.layers`). What lies along the direction is visited first; what lies against it
(other readers on the way backward, a producer on the way forward) has to absorb the inverse.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.laws import Constraints
from rewrite.affine.layers import Side
from rewrite.affine.plan import Absorption, EditSet
from rewrite.graph.traits import Trait, operation

if TYPE_CHECKING:
    from rewrite.affine.context import AnalysisContext, MapRequest
    from rewrite.affine.layers import Layer


_COMBINES = Trait.ADDS | Trait.JOINS

_VALUES = 400
"""Values that one propagation may change: a bound on the work."""


class Alternatives:
    """The choices of one attempt: which of several operands absorbs a shift, or a scale."""

    def __init__(self, wanted: list[int]) -> None:
        self._wanted = wanted
        self._taken: list[tuple[int, int]] = []

    def choose(self, options: int) -> int:
        """Return the number of the operand to try at the next choice."""
        position = len(self._taken)
        chosen = self._wanted[position] if position < len(self._wanted) else 0
        self._taken.append((chosen, options))
        return chosen

    def next(self) -> list[int]:
        """Return the next combination of choices to try, or [] if all were."""
        taken = list(self._taken)
        while taken:
            chosen, options = taken.pop()
            if chosen + 1 < options:
                return [one for one, _ in taken] + [chosen + 1]
        return []


class PropagationSearch:
    """One attempt: the values that change, and the layers that absorb the change."""

    def __init__(
        self, context: AnalysisContext, request: MapRequest, alternatives: Alternatives
    ) -> None:
        self.context = context
        self.captured = context.captured
        self.direction = request.direction
        self.absorb_inverse = request.absorb_inverse
        self._constraints = Constraints(request.positive, alternatives.choose)
        self._seeds: frozenset[Node] = frozenset()
        self._changed: dict[Node, ChannelMap] = {}
        self._untouched: set[Node] = set()
        self._done: dict[tuple[Node, Side | None], dict[Node, ChannelMap]] = {}
        self._edits = EditSet(context, request.direction)
        self._along: deque[tuple[Node, Node, Side]] = deque()
        self._against: deque[tuple[Node, Node, Side]] = deque()

    def run(self, seeds: dict[Node, tuple[Node, Side]], channel_map: ChannelMap) -> Absorption:
        """Propagate from the values of `seeds` until layers have absorbed everything.

        Raises:
            DeclinedError: some value can change in no way that the rest of the model allows.
        """
        self._seeds = frozenset(seeds)
        for node, (value, side) in seeds.items():
            axis = self.context.ranks.from_end(value, channel_map.axis)
            self._done[(node, side)] = {value: channel_map.moved(axis)}
        for node, (value, side) in seeds.items():
            self._change(value, self._done[(node, side)][value])
        while self._along or self._against:
            along = bool(self._along)
            node, value, side = (self._along if along else self._against).popleft()
            self._visit(node, value, side, along)
        relied = self._constraints
        return Absorption(
            self._edits.collect(), relied.relied_on_sign, tuple(relied.relied_on_size)
        )

    def _change(self, value: Node, channel_map: ChannelMap) -> None:
        if channel_map.trivial:
            if value in self._changed:
                raise DeclinedError(f"{value.name} would have to change and not to change", value)
            self._untouched.add(value)
            return
        if value in self._untouched:
            raise DeclinedError(f"{value.name} would have to change and not to change", value)
        if value in self._changed:
            if not self._changed[value].same(channel_map):
                raise DeclinedError(_two_ways(value), value)
            return
        self._changed[value] = channel_map
        if len(self._changed) > _VALUES:
            raise DeclinedError(f"more than {_VALUES} values would have to change", value)
        self._check_readers(value)
        self._check_against(value)
        producers, readers = self._along, self._against
        if self.direction is Direction.FORWARD:
            producers, readers = readers, producers
        producers.append((value, value, Side.OUTPUT))
        for reader in value.users:
            readers.append((reader, value, Side.INPUT))

    def _check_readers(self, value: Node) -> None:
        readers = self.captured.readers(value)
        called = self.context.rules.called
        if not readers.known:
            raise DeclinedError(
                f"the output of {called(value)} has readers that were not traced: {readers.reason}",
                value,
            )
        if found := self.captured.effects.late_write(value):
            write, reader = found
            raise DeclinedError(
                f"the output of {called(value)} is changed in place by "
                f"{called(write)} and read elsewhere ({reader.name})",
                write,
            )

    def _check_against(self, value: Node) -> None:
        """Decline at once what a neighbour against the direction will decline, come what may.

        Else each norm of a residual stream would walk all of it before it is told.
        """
        if self.direction is Direction.FORWARD:
            neighbours = [(value, Side.OUTPUT)]
        else:
            neighbours = [(reader, Side.INPUT) for reader in value.users]
        for node, side in neighbours:
            if node in self.context.folded or (node, side) in self._done:
                continue
            if self._combines_later(node):
                raise DeclinedError(self._against_reason(node, value), node)
            layer = self.context.layer(node)
            if layer is None or (side is Side.INPUT and not layer.reads(node, value)):
                continue
            if not self.absorb_inverse:
                raise DeclinedError(self._against_reason(node, value), node)
            if side is Side.INPUT and layer.kind == "gain":
                raise DeclinedError(layer.why_not, node)

    def _combines_later(self, node: Node) -> bool:
        """Return whether `node` is a sum or a concatenation behind the seeds.

        It changes with each of its operands, so it would have to be one of the changed values; no
        way backward reaches it.
        """
        if self.direction is Direction.FORWARD or self.absorb_inverse:
            return False
        row = operation(node)
        if row is None or not row.traits & _COMBINES:
            return False
        order = self.context.order
        return all(s.graph is node.graph and order[s] < order[node] for s in self._seeds)

    def _visit(self, node: Node, value: Node, side: Side, along: bool) -> None:
        channel_map = self._changed[value]
        layer = self._layer_at(node, value, side)
        key = (node, side) if layer is not None or (node, side) in self._done else (node, None)
        if node in self._seeds and key not in self._done:
            raise DeclinedError("its own input depends on its output", node)
        if key in self._done and not (layer is not None and self._reads_more(layer, key, value)):
            expected = self._done[key].get(value)
            if expected is None or not expected.same(channel_map):
                raise DeclinedError(_two_ways(value), value)
            return
        if side is Side.INPUT and self.context.rules.reads_only_shape(node, value):
            return
        if not along and not self.absorb_inverse:
            self._agree(node, value, channel_map, layer is not None)
            return
        if layer is not None:
            self._done[key] = {**self._done.get(key, {}), value: channel_map}
            self._edits.add(layer, node, side, value, channel_map)
            return
        if side is Side.OUTPUT and node.op in ("placeholder", "get_attr"):
            what = "an input" if node.op == "placeholder" else "a constant"
            raise DeclinedError(
                f"{node.name} is {what} of the model, not the output of a layer", node
            )
        demands = self.context.rules.around(node, value, channel_map, self._constraints)
        demands.setdefault(value, channel_map)
        self._done[key] = demands
        for other, needed in demands.items():
            if other is not value:
                self._change(other, needed)
            elif not needed.same(channel_map):
                raise DeclinedError(_two_ways(value), value)

    def _reads_more(self, layer: Layer, key: tuple[Node, Side | None], value: Node) -> bool:
        """Return whether `value` is another of the values that the groups of a layer read."""
        return (
            value in layer.operands and value not in self._done[key] and key[0] not in self._seeds
        )

    def _layer_at(self, node: Node, value: Node, side: Side) -> Layer | None:
        """Return the layer that `node` calls, if it reads or writes `value` as its data."""
        layer = None if node in self.context.folded else self.context.layer(node)
        if layer is None or (side is Side.INPUT and not layer.reads(node, value)):
            return None
        return None if side is Side.OUTPUT and layer.operands else layer

    def _agree(self, node: Node, value: Node, channel_map: ChannelMap, absorbs: bool) -> None:
        """Accept another neighbour of a changed value if nothing else has to change for it.

        A chunk whose other parts stay what they are is one.
        """
        reason = self._against_reason(node, value)
        if absorbs or node.op in ("placeholder", "get_attr", "output"):
            raise DeclinedError(reason, node)
        try:
            demands = self.context.rules.around(node, value, channel_map, self._constraints)
        except DeclinedError:
            raise DeclinedError(reason, node) from None
        for other, needed in demands.items():
            held = self._changed.get(other)
            if not needed.trivial and (held is None or not held.same(needed)):
                raise DeclinedError(reason, node)
        for other, needed in demands.items():
            self._change(other, needed)
        self._done[(node, None)] = {**demands, value: channel_map}

    def _against_reason(self, node: Node, value: Node) -> str:
        called = self.context.rules.called
        if self.direction is Direction.BACKWARD:
            return f"the output of {called(value)} is also read by {called(node)}"
        return (
            f"the map would also have to be taken out of {called(value)}, which meets the "
            "normalized value in a sum, a product or a concatenation"
        )


def _two_ways(value: Node) -> str:
    return f"{value.name} would have to change in two different ways"
