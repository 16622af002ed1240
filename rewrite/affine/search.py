"""One attempt to absorb a map: the values that change, grown until layers take the change up.

    backward    x' = s.x + t takes the place of x: what produces x takes up (s, t)
    forward     y' = x takes the place of y = s.y' + t: what reads y takes up (s, t)

Every operation next to a changed value says which other values have to change with it
(`rewrite.affine.rules`); a layer ends the growth by taking up the map (`rewrite.affine.layers`).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError
from rewrite.affine.laws import Constraints
from rewrite.affine.layers import Layer, Side
from rewrite.affine.plan import Absorption, Edit
from rewrite.graph.operators import norm_of
from rewrite.graph.traits import Trait, has

if TYPE_CHECKING:
    from rewrite.affine.context import AnalysisContext


_VALUES = 400
"""Values that one growth may change: a bound on the work."""


class PropagationSearch:
    """One attempt: the values that change, and the layers that take the change up."""

    def __init__(
        self, around: AnalysisContext, sign: int, positive: bool, compensate: bool, ways: list[int]
    ) -> None:
        self.around = around
        self.captured = around.captured
        self.sign = sign
        self.compensate = compensate
        self.demand = Constraints(positive, self._choose)
        self._ways = ways
        self._seeds: frozenset[Node] = frozenset()
        self._taken: list[tuple[int, int]] = []
        self._lanes: dict[Node, ChannelMap] = {}
        self._untouched: set[Node] = set()
        self._done: dict[tuple[Node, str], dict[Node, ChannelMap]] = {}
        self._edits: dict[tuple[str, Side], dict[Node, Edit]] = {}
        self._near: deque[tuple[Node, Node, str]] = deque()
        self._far: deque[tuple[Node, Node, str]] = deque()

    # -- forks --------------------------------------------------------------------------------

    def _choose(self, options: int) -> int:
        position = len(self._taken)
        way = self._ways[position] if position < len(self._ways) else 0
        self._taken.append((way, options))
        return way

    def next_ways(self) -> list[int]:
        """Return the next combination of ways to try, or [] if all were."""
        taken = list(self._taken)
        while taken:
            way, options = taken.pop()
            if way + 1 < options:
                return [w for w, _ in taken] + [way + 1]
        return []

    # -- growing ------------------------------------------------------------------------------

    def run(self, seeds: dict[Node, tuple[Node, str]], lane: ChannelMap) -> Absorption:
        """Grow from the values of `seeds` until layers have taken up everything."""
        self._seeds = frozenset(seeds)
        for node, (value, side) in seeds.items():
            own = lane.moved(self.around.ranks.from_end(value, lane.axis))
            self._done[(node, side)] = {value: own}
        for node, (value, side) in seeds.items():
            self._change(value, self._done[(node, side)][value])
        while self._near or self._far:
            near = bool(self._near)
            node, value, side = (self._near if near else self._far).popleft()
            self._visit(node, value, side, near)
        return Absorption(self._collect(), self.demand.relied_on_sign)

    def _change(self, value: Node, lane: ChannelMap) -> None:
        if lane.trivial:
            if value in self._lanes:
                raise DeclinedError(f"{value.name} would have to change and not to change")
            self._untouched.add(value)
            return
        if value in self._untouched:
            raise DeclinedError(f"{value.name} would have to change and not to change")
        if value in self._lanes:
            if not self._lanes[value].same(lane):
                raise DeclinedError(f"{value.name} would have to change in two different ways")
            return
        self._lanes[value] = lane
        if len(self._lanes) > _VALUES:
            raise DeclinedError(f"more than {_VALUES} values would have to change")
        self._check_readers(value)
        self._check_far(value)
        backward, forward = self._near, self._far
        if self.sign > 0:
            backward, forward = forward, backward
        backward.append((value, value, "behind"))
        for reader in value.users:
            forward.append((reader, value, "in front"))

    def _check_readers(self, value: Node) -> None:
        readers = self.captured.readers(value)
        called = self.around.rules.called(value)
        if not readers.known:
            raise DeclinedError(
                f"the output of {called} has readers that were not traced: {readers.reason}"
            )
        if found := self.captured.effects.late_write(value):
            write, reader = found
            raise DeclinedError(
                f"the output of {called} is changed in place by "
                f"{self.around.rules.called(write)} and read elsewhere ({reader.name})"
            )

    def _check_far(self, value: Node) -> None:
        """Refuse at once what a far neighbour of `value` will refuse, whatever else changes.

        Else each norm of a residual stream would walk all of it before it is told.
        """
        if self.sign > 0:
            far = [(value, "behind")]
        else:
            far = [(reader, "in front") for reader in value.users]
        for node, side in far:
            if node in self.around.folded or (node, side) in self._done:
                continue
            if self._sums_later(node):
                raise DeclinedError(self._far_reason(node, value))
            layer = self.around.layer(node)
            if layer is None or (side == "in front" and node.all_input_nodes[:1] != [value]):
                continue
            if not self.compensate:
                raise DeclinedError(self._far_reason(node, value))
            if side == "in front" and layer.kind == "gain":
                raise DeclinedError(layer.why_not)

    def _sums_later(self, node: Node) -> bool:
        """Return whether `node` is a sum that no backward growth reaches: it comes after the seeds.

        A sum changes with each of its operands, so it would have to be one of the changed values.
        """
        if self.sign > 0 or self.compensate:
            return False
        order = self.around.order
        later = all(s.graph is node.graph and order[s] < order[node] for s in self._seeds)
        return later and has(node, Trait.ADDS)

    def _visit(self, node: Node, value: Node, side: str, near: bool) -> None:
        lane = self._lanes[value]
        layer = None if node in self.around.folded else self.around.layer(node)
        absorbs = layer is not None and (side == "behind" or node.all_input_nodes[:1] == [value])
        key = (node, side) if absorbs or (node, side) in self._done else (node, "through")
        if node in self._seeds and key not in self._done:
            raise DeclinedError("its own input depends on its output")
        if key in self._done:
            expected = self._done[key].get(value)
            if expected is None or not expected.same(lane):
                raise DeclinedError(f"{value.name} would have to change in two different ways")
            return
        if side == "in front" and self.around.rules.reads_only_shape(node, value):
            return
        if not near and not self.compensate:
            self._agree(node, value, lane, absorbs)
            return
        if absorbs:
            assert layer is not None
            self._done[key] = {value: lane}
            self._absorb(layer, node, "behind" if side == "behind" else "in front", lane)
            return
        if side == "behind" and node.op in ("placeholder", "get_attr"):
            what = "an input" if node.op == "placeholder" else "a constant"
            raise DeclinedError(f"{node.name} is {what} of the model, not the output of a layer")
        demands = self.around.rules.around(node, value, lane, self.demand)
        demands.setdefault(value, lane)
        self._done[key] = demands
        for other, needed in demands.items():
            if other is not value:
                self._change(other, needed)
            elif not needed.same(lane):
                raise DeclinedError(f"{value.name} would have to change in two different ways")

    def _agree(self, node: Node, value: Node, lane: ChannelMap, absorbs: bool) -> None:
        """Accept another neighbour of a changed value if nothing else has to change for it.

        A chunk whose other parts stay what they are is one.
        """
        reason = self._far_reason(node, value)
        if absorbs or node.op in ("placeholder", "get_attr", "output"):
            raise DeclinedError(reason)
        try:
            demands = self.around.rules.around(node, value, lane, self.demand)
        except DeclinedError:
            raise DeclinedError(reason) from None
        for other, needed in demands.items():
            held = self._lanes.get(other)
            if not needed.trivial and (held is None or not held.same(needed)):
                raise DeclinedError(reason)
        for other, needed in demands.items():
            self._change(other, needed)
        self._done[(node, "through")] = {**demands, value: lane}

    def _far_reason(self, node: Node, value: Node) -> str:
        called = self.around.rules.called
        if self.sign < 0:
            return f"the output of {called(value)} is also read by {called(node)}"
        return (
            f"the map would also have to be taken out of {called(value)}, which meets the "
            "normalized value in a sum, a product or a concatenation"
        )

    # -- absorbing ----------------------------------------------------------------------------

    def _absorb(self, layer: Layer, node: Node, side: Side, lane: ChannelMap) -> None:
        channels = layer.channels_out if side == "behind" else layer.channels_in
        index = lane.index
        if lane.spread and side == "in front" and len(index) and channels % len(index) == 0:
            index = index.repeat_interleave(channels // len(index))
        elif lane.spread:
            raise DeclinedError(f"{layer.name} reads channels that a flatten repeats unknown times")
        axis = self._axis(layer, node, lane)
        if axis != layer.axis:
            raise DeclinedError(_other_axis(layer, side, axis))
        if len(index) != channels:
            raise DeclinedError(
                f"{layer.name} has {channels} channels where {len(index)} are mapped"
            )
        if side == "in front":
            if layer.kind == "gain":
                raise DeclinedError(layer.why_not)
            if lane.shift and not layer.keeps_shift:
                raise DeclinedError(layer.why_not)
        elif layer.kind == "gain" and lane.shift and layer.bias is None and _is_rms(self, node):
            raise DeclinedError(f"{layer.name} has no bias to take up a shift")
        inverse = (self.sign > 0) == (side == "behind")
        edit = Edit(layer, side, index, lane.scale, lane.shift, inverse)
        self._edits.setdefault((layer.key, side), {})[node] = edit

    def _axis(self, layer: Layer, node: Node, lane: ChannelMap) -> int:
        """Return the axis of the lane as the layer counts its own."""
        if lane.axis < 0 or layer.axis >= 0:
            return lane.axis
        rank = self.around.ranks.rank(node)
        if rank is None:
            raise DeclinedError(
                f"the number of axes of the output of {layer.name} is unknown without example "
                f"inputs: axis {lane.axis} may not be the one that it writes (pass example_inputs)"
            )
        return lane.axis - rank

    def _collect(self) -> tuple[Edit, ...]:
        """Check that each layer changes alike at all of its calls, and return one edit each."""
        edits = []
        for (_, side), by_call in self._edits.items():
            edit = next(iter(by_call.values()))
            layer = edit.layer
            if layer.key in self.around.gone:
                raise DeclinedError(f"the affine part of {layer.name} has been folded itself")
            if not layer.absorbs:
                raise DeclinedError(f"{layer.name} has no weight and bias to take up a map")
            if (reason := self.around.tensor_readers.refusal(layer)) is not None:
                raise DeclinedError(reason)
            for call in self.around.tensor_readers.calls(layer):
                other = by_call.get(call)
                if other is None:
                    raise DeclinedError(
                        f"{layer.name} is called more than once, and at {call.name} its "
                        f"{'output' if side == 'behind' else 'input'} is not normalized so "
                        "(unshare clones the layer for each call)"
                    )
                alike = torch.equal(other.index, edit.index) and (
                    (other.scale, other.shift) == (edit.scale, edit.shift)
                )
                if not alike:
                    raise DeclinedError(
                        f"{layer.name} would have to change differently at {call.name}"
                    )
            edits.append(edit)
        return tuple(edits)


def _is_rms(growth: PropagationSearch, node: Node) -> bool:
    norm = norm_of(growth.captured, node)
    return norm is not None and norm.kind == "rms"


def _other_axis(layer: Layer, side: Side, axis: int) -> str:
    does = "writes" if side == "behind" else "reads"
    return (
        f"{layer.name} {does} its channels along axis {layer.axis} (from the end), and the map is "
        f"along axis {axis}"
    )
