"""Which channels of a network share one positive scale, found through its graph.

    y = W x      W → D_out W D_in⁻¹                 inputs and outputs have scales of their own
    y = γ n(x)   γ → D_out γ                        any norm: its input keeps its scale
    y = f(x)     f(d x) = d f(x): relu, pooling     one scale before and behind
    y = x + z    one scale for all three            all of a residual stream has one a channel
    y = [x, z]   each its own part
    y = x g      g a gate or a constant: x and y share, g keeps its scale

What reaches an input, an output, code that was not traced, or any other operation keeps scale 1.
Every value of every traced forward is visited once, in data-flow order; calls of one layer share
its scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.laws import Constraints
from rewrite.affine.layers import Layer
from rewrite.affine.planner import Planner
from rewrite.affine.slices import Parts
from rewrite.graph.captured import Captured
from rewrite.graph.traits import Call, Trait, call_of

_SUMS = frozenset({"add", "sub", "rsub", "maximum", "minimum"})


class Units:
    """Labels of channels, united as it is found that they share a scale.

    A label is an integer; the united ones have one root. A root may be fixed: its scale is 1.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Return labels of channels that nothing is known of, int64."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """Return the root of a label."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """Return the roots of many labels."""
        return torch.tensor([self.root(label) for label in labels.tolist()], dtype=torch.int64)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Let each channel of one value share the scale of the other's at its position."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parents[b] = a
                if (reason := self._reasons.pop(b, None)) is not None:
                    self._reasons.setdefault(a, reason)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Let the scales of channels be 1; the first reason is kept."""
        for label in set(labels.tolist()):
            self._reasons.setdefault(self.root(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why the scale of a label is 1, or None if it is free."""
        return self._reasons.get(self.root(label))


class ScaledOperations:
    """What operations without weights make of the labels of their inputs.

    Args:
        planner: what is known of the operations of the model.
        units: where labels are united and fixed.
        known: the labels of each value that was visited.
        clipped: calls of clipping activations that become ReLU.
    """

    def __init__(
        self,
        planner: Planner,
        units: Units,
        known: Mapping[Node, ChannelMap],
        clipped: frozenset[Node],
    ) -> None:
        self._captured = planner.captured
        self._called = planner.called
        self._rules = planner.context.rules
        self._ranks = planner.context.ranks
        self._parts = Parts(self._captured, self._ranks)
        self._units = units
        self._known = known
        self._clipped = clipped

    def result(self, node: Node, inputs: list[Node]) -> ChannelMap | None:
        """Return the labels of what a call returns, or None; what it does not scale is fixed.

        Args:
            node: the call.
            inputs: those of its inputs that have labels.
        """
        inputs = [value for value in inputs if not self._rules.reads_only_shape(node, value)]
        if not inputs:
            return None
        try:
            return self._through(node, inputs)
        except DeclinedError as declined:
            for value in inputs:
                self._units.fix(self._known[value].index, str(declined))
            return None

    def _through(self, node: Node, inputs: list[Node]) -> ChannelMap:
        first, call = self._known[inputs[0]], call_of(self._captured, node)
        if node in self._clipped or (call is not None and _keeps(call)):
            return first
        if call is not None and call.name in _SUMS:
            return self._sum(call, inputs)
        if call is not None and call.name in ("mul", "div"):
            return self._product(call, inputs)
        joined = self._parts.join(node)
        if joined is not None:
            return self._join(node, *joined)
        if len(inputs) > 1:
            raise DeclinedError(f"{self._called(node)} combines values in a way not followed", node)
        part = self._parts.part(node, first, Direction.FORWARD)
        if part is not None:
            return part
        if call is not None and call.name == "pixel_shuffle":
            first = self._shuffled(call, first)
        found = self._rules.around(node, inputs[0], first, Constraints(True, lambda ways: 0))
        if node not in found:
            raise DeclinedError(f"{self._called(node)} does not pass a scale on", node)
        return found[node]

    def _sum(self, call: Call, inputs: list[Node]) -> ChannelMap:
        called = self._called(call.node)
        if any(operand not in self._known for operand in (call.operand, call.get("other"))):
            raise DeclinedError(f"{called} adds something whose scale is fixed", call.node)
        first, *others = (self._known[value] for value in inputs)
        for other in others:
            if not _alike(first, other):
                raise DeclinedError(f"{called} adds values whose channels lie differently")
            self._units.unite(first.index, other.index)
        if self._ranks.size(call.node, first.axis) not in (None, len(first.index)):
            raise DeclinedError(f"{called} broadcasts the channels", call.node)
        return first

    def _product(self, call: Call, inputs: list[Node]) -> ChannelMap:
        node, called = call.node, self._called(call.node)
        if len(inputs) > 1 or call.operand is call.get("other"):
            raise DeclinedError(f"{called} multiplies or divides two computed values", node)
        if call.name == "div" and call.operand is not inputs[0]:
            raise DeclinedError(f"{called} divides by a computed value", node)
        if call.get("rounding_mode") is not None:
            raise DeclinedError(f"{called} rounds", node)
        found = self._known[inputs[0]]
        if self._ranks.size(node, found.axis) != len(found.index):
            raise DeclinedError(f"{called} may broadcast the channels (pass example_inputs)", node)
        return found

    def _join(self, node: Node, parts: list[Node], axis: int) -> ChannelMap:
        """Put the labels of the parts one behind the other; what has none keeps its scale."""
        called = self._called(node)
        known = [self._known[part] for part in parts if part in self._known]
        if axis >= 0 or any(part.axis >= 0 or part.spread for part in known):
            raise DeclinedError(
                f"how the channels lie in {called} is unknown (pass example_inputs)", node
            )
        if axis != known[0].axis:
            if len(known) < len(parts) or not all(_alike(known[0], other) for other in known):
                raise DeclinedError(f"{called} stacks values whose scales are fixed", node)
            for other in known[1:]:
                self._units.unite(known[0].index, other.index)
            return known[0]
        labels = [self._labels(node, part, axis) for part in parts]
        return known[0].moved(axis, torch.cat(labels))

    def _labels(self, node: Node, part: Node, axis: int) -> Tensor:
        """Return the labels of one part of a concatenation."""
        found = self._known.get(part)
        if found is not None and found.axis == axis:
            return found.index
        size = self._ranks.size(part, axis)
        if found is not None or size is None:
            raise DeclinedError(
                f"how the channels lie in {part.name}, a part of {self._called(node)}, is unknown",
                node,
            )
        fixed = self._units.new(size)
        self._units.fix(fixed, f"{part.name} has a fixed scale")
        return fixed

    def _shuffled(self, call: Call, given: ChannelMap) -> ChannelMap:
        """Let the channels that a pixel shuffle makes one of share a scale."""
        factor = call.get("upscale_factor")
        if not isinstance(factor, int) or len(given.index) % factor**2:
            raise DeclinedError("a pixel shuffle by an unknown factor", call.node)
        rows = given.index.view(-1, factor**2)
        for column in range(1, factor**2):
            self._units.unite(rows[:, 0], rows[:, column])
        return given.moved(given.axis, self._units.roots(given.index))


@dataclass(eq=False)
class ScaledLayer:
    """One layer, and the label of each channel that it reads and writes."""

    layer: Layer
    reads: Tensor
    writes: Tensor


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Channels of values that belong together, and the layers around them.

    Attributes:
        target: the first layer that writes them.
        units: the roots of their free scales, in the order of its channels.
        writers, readers: the layers that would change, in data-flow order.
    """

    target: str
    units: Tensor
    writers: tuple[ScaledLayer, ...]
    readers: tuple[ScaledLayer, ...]


class Scales:
    """The scales of one captured model.

    Args:
        captured: the model; with shapes more of it can be followed.
        clipped: calls of clipping activations that become ReLU, and so pass a scale.
    """

    def __init__(self, captured: Captured, clipped: frozenset[Node] = frozenset()) -> None:
        self.captured = captured
        self.planner = Planner(captured)
        self.units = Units()
        self.layers: dict[str, ScaledLayer] = {}
        self._maps: dict[Node, ChannelMap] = {}
        self._operations = ScaledOperations(self.planner, self.units, self._maps, clipped)
        for node in captured.nodes():
            self._visit(node)

    # -- results ------------------------------------------------------------------------------

    def free(self, labels: Tensor) -> Tensor:
        """Return the roots of labels, and -1 where the scale is 1."""
        units = self.units
        return torch.tensor(
            [-1 if units.reason(v) is not None else units.root(v) for v in labels.tolist()],
            dtype=torch.int64,
        )

    def groups(self) -> Iterator[ScaleGroup]:
        """Yield the groups of free channels, in data-flow order of their first writers."""
        layers = tuple(self.layers.values())
        reads = [_free(self.free(layer.reads)) for layer in layers]
        writes = [_free(self.free(layer.writes)) for layer in layers]
        done: set[int] = set()
        for first, own in zip(layers, writes, strict=True):
            units = {root: None for root in own if root not in done}
            if not units:
                continue
            size = -1
            while size < len(units):  # what writes some of these channels writes all of its own
                size = len(units)
                for others in writes:
                    if not units.keys().isdisjoint(others):
                        units |= others
            done |= units.keys()
            writers, readers = (
                tuple(
                    layer
                    for layer, roots in zip(layers, side, strict=True)
                    if not units.keys().isdisjoint(roots)
                )
                for side in (writes, reads)
            )
            yield ScaleGroup(first.layer.name, torch.tensor(list(units)), writers, readers)

    def refused(self) -> Iterator[tuple[Layer, str]]:
        """Yield every layer of which no output may be scaled, and why.

        A layer in front of a norm is left out: the norm carries its scale.
        """
        for scaled in self.layers.values():
            behind = [self.planner.layer(user) for user in scaled.layer.node.users]
            if any(layer is not None and layer.kind != "kernel" for layer in behind):
                continue
            if len(scaled.writes) and bool((self.free(scaled.writes) < 0).all()):
                reason = self.units.reason(int(scaled.writes[0]))
                yield scaled.layer, reason or ""

    # -- visiting -----------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self._maps]
        if node.op == "output" or node.op in ("placeholder", "get_attr"):
            return  # an output has readers that are unknown, and was fixed where it was made
        layer = self.planner.layer(node)
        if layer is not None:
            found = self._at_layer(layer, node, inputs)
        elif not inputs:
            return
        else:
            found = self._operations.result(node, inputs)
        if found is None:
            return
        readers = self.captured.readers(node)
        if not readers.known:
            self.units.fix(found.index, readers.reason)
        self._maps[node] = found

    # -- layers -------------------------------------------------------------------------------

    def _at_layer(self, layer: Layer, node: Node, inputs: list[Node]) -> ChannelMap | None:
        scaled = self.layers.get(layer.key)
        if scaled is None:
            scaled = ScaledLayer(
                layer, self.units.new(layer.channels_in), self.units.new(layer.channels_out)
            )
            self.layers[layer.key] = scaled
            if layer.kind != "kernel":
                self.units.fix(scaled.reads, f"{layer.name} normalizes")
            if (reason := self._stays(layer)) is not None:
                self.units.fix(scaled.reads, reason)
                self.units.fix(scaled.writes, reason)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        for value in inputs:
            if value is not source:
                self.units.fix(self._maps[value].index, f"{layer.name} reads it as a tensor")
        self._read(scaled, None if source is None else self._maps.get(source))
        if layer.axis >= 0:
            self.units.fix(scaled.writes, "the number of its axes is unknown (pass example_inputs)")
            return None
        return ChannelMap(layer.axis, scaled.writes, scale=True, shift=False)

    def _read(self, scaled: ScaledLayer, given: ChannelMap | None) -> None:
        """Let what a call reads be what the layer reads at its other calls."""
        layer = scaled.layer
        if given is None:
            self.units.fix(scaled.reads, f"the input of {layer.name} has a fixed scale")
            return
        index, channels = given.index, layer.channels_in
        if given.spread and len(index) and channels % len(index) == 0:
            index = index.repeat_interleave(channels // len(index))
        if given.axis != layer.axis or len(index) != channels:
            reason = f"{layer.name} reads its channels along another axis"
            self.units.fix(given.index, reason)
            self.units.fix(scaled.reads, reason)
            return
        self.units.unite(index, scaled.reads)

    def _stays(self, layer: Layer) -> str | None:
        """Return why the tensors of a layer must not change, or None."""
        if layer.kind != "kernel":
            if layer.weight is None or not layer.absorbs:
                return f"{layer.name} has no weight"
            if layer.kind == "norm" and layer.bias is None:
                return f"{layer.name} has no bias"
        reason = self.planner.context.tensor_readers.refusal(layer)
        if reason is not None:
            return reason
        assert layer.weight is not None
        weight = self.captured.tensor(layer.weight)
        if weight.dtype not in (torch.float32, torch.float64):
            return f"{layer.name} is stored in {weight.dtype}, which rounds a scaled weight"
        if weight.device.type == "meta" or not bool(weight.isfinite().all()):
            return f"{layer.name} holds values that are not finite"
        return None


def _keeps(call: Call) -> bool:
    """Return whether a call keeps the channels of its operand where they are, or parts them."""
    return call.name == "abs" or Trait.SPLITS in call.operation.traits


def _free(roots: Tensor) -> dict[int, None]:
    return dict.fromkeys(root for root in roots.tolist() if root >= 0)


def _alike(one: ChannelMap, other: ChannelMap) -> bool:
    return (one.axis, len(one.index), one.spread) == (other.axis, len(other.index), other.spread)
