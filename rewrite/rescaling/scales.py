"""Which channels of a network share one positive scale, found through its graph.

    y = W x      W → D_out W D_in⁻¹                 inputs and outputs have scales of their own
    y = γ n(x)   γ → D_out γ                        any norm: its input has scale 1
    y = f(x)     f(d x) = d f(x): relu, pooling     x and y share a scale
    y = x + z    all three share a scale            a residual stream has one scale per channel
    y = x + b    b a tensor of the model: scaled like x (`rewrite.rescaling.scaled_operations`)
    y = [x, z]   each part keeps its own scale
    y = x g      g a gate or a constant: x and y share a scale, g has scale 1

Channels that reach an input, an output, untraced code or any other operation have scale 1. Every
value of every traced forward is visited once, in data-flow order; all calls of a layer share its
scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap
from rewrite.affine.layers import Layer
from rewrite.affine.planner import Planner
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.operators import norm_of
from rewrite.rescaling.scaled_operations import ScaledLayer, ScaledOperations, Units


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """The channels of one or more values with their free scales, and the layers around them.

    Attributes:
        target: the name of the first layer that writes them.
        units: the roots of their free scales, in the order of its channels.
        writers, readers: the layers that a rescaling changes, in data-flow order.
        beside: further tensors of the model that are scaled like these channels.
    """

    target: str
    units: Tensor
    writers: tuple[ScaledLayer, ...]
    readers: tuple[ScaledLayer, ...]
    beside: tuple[ScaledLayer, ...] = ()


class Scales:
    """The scales of one captured model.

    Args:
        captured: the model; with shapes more operations can be followed.
        clipped: calls of clipping activations that will become ReLU, and then pass a scale.
        other: the model in its other mode, if that runs other lines; scales must suit both.
    """

    def __init__(
        self,
        captured: Captured,
        clipped: frozenset[Node] = frozenset(),
        other: Captured | None = None,
    ) -> None:
        self.captured = captured
        self.planner = Planner(captured)
        self.units = Units()
        self.layers: dict[str, ScaledLayer] = {}
        self._maps: dict[Node, ChannelMap] = {}
        self._operations = ScaledOperations(self.planner, self.units, self._maps, clipped)
        for node in captured.nodes():
            self._visit(node)
        if other is not None:
            self._join(Scales._sharing(self, other, clipped))

    @classmethod
    def _sharing(cls, scales: Scales, other: Captured, clipped: frozenset[Node]) -> Scales:
        """Visit the model in its other mode, with the units and layers of the first."""
        made = cls.__new__(cls)
        made.captured, made.planner = other, Planner(other)
        made.units, made.layers, made._maps = scales.units, scales.layers, {}
        made._operations = ScaledOperations(made.planner, made.units, made._maps, clipped)
        for node in other.nodes():
            made._visit(node)
        return made

    def _join(self, other: Scales) -> None:
        """Fix the scales of what only the other mode reads."""
        known = {vector.layer.key for vector in self._operations.vectors}
        for vector in other._operations.vectors:
            if vector.layer.key not in known:
                name = vector.layer.name
                self.units.fix(vector.writes, f"{name} is read in the other mode alone")

    # -- results ------------------------------------------------------------------------------

    def free(self, labels: Tensor) -> Tensor:
        """Return the roots of labels, and -1 where the scale is 1."""
        units = self.units
        return torch.tensor(
            [-1 if units.reason(v) is not None else units.root(v) for v in labels.tolist()],
            dtype=torch.int64,
        )

    def channels(self, node: Node) -> ChannelMap | None:
        """Return the axis and labels of a value's channels; None if it is not followed."""
        return self._maps.get(node)

    def groups(self) -> Iterator[ScaleGroup]:
        """Yield the groups of free channels, in data-flow order of their first writers."""
        layers, vectors = tuple(self.layers.values()), tuple(self._operations.vectors)
        reads = _ByUnit([_free(self.free(layer.reads)) for layer in layers])
        writes = _ByUnit([_free(self.free(layer.writes)) for layer in layers])
        beside = _ByUnit([_free(self.free(vector.writes)) for vector in vectors])
        done: set[int] = set()
        for first, own in zip(layers, writes.own, strict=True):
            if not own or own.keys() <= done:
                continue
            units = writes.joined(own)
            done |= units.keys()
            yield ScaleGroup(
                first.layer.name,
                torch.tensor(list(units)),
                tuple(layers[number] for number in writes.having(units)),
                tuple(layers[number] for number in reads.having(units)),
                tuple(vectors[number] for number in beside.having(units)),
            )

    def refused(self) -> Iterator[tuple[Layer, str]]:
        """Yield every layer whose outputs all have scale 1, with the reason.

        A layer that a norm follows is left out: the norm's weight has the scale.
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
        operations, layer = self._operations, self.planner.layer(node)
        scattered = [n for n in node.all_input_nodes if n in operations.scattered]
        found = operations.gathered(node, scattered) if scattered else None
        if layer is not None:
            found = self._at_layer(layer, node, inputs)
        elif inputs:
            found = operations.result(node, inputs)
        if found is not None:
            self._maps[node] = found
        labels = operations.scattered.get(node) if found is None else found.index
        readers = self.captured.readers(node)
        if labels is not None and not readers.known:
            self.units.fix(labels.flatten(), readers.reason)

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
        """Unite the labels of a call's input with those of the layer's other calls."""
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
        if layer.weight is None:
            return f"{layer.name} has no one weight"
        weight = self.captured.values(layer.weight)
        if weight.dtype not in (torch.float32, torch.float64):
            return f"{layer.name} is stored in {weight.dtype}, which rounds a scaled weight"
        if weight.device.type == "meta" or not all(map(self._is_finite, self._tensors(layer))):
            return f"{layer.name} holds values that are not finite"
        return None

    def _tensors(self, layer: Layer) -> Iterator[TensorRef]:
        """Yield the tensors that a call of a layer reads."""
        norm = norm_of(self.captured, layer.node)
        held = () if norm is None else (norm.running_mean, norm.running_var)
        yield from (ref for ref in (layer.weight, layer.bias, *held) if ref is not None)

    def _is_finite(self, ref: TensorRef) -> bool:
        return bool(self.captured.values(ref).isfinite().all())


class _ByUnit:
    """An index of layers by their free units."""

    def __init__(self, own: Sequence[dict[int, None]]) -> None:
        self.own = own
        self._having: dict[int, list[int]] = defaultdict(list)
        for number, units in enumerate(own):
            for unit in units:
                self._having[unit].append(number)

    def having(self, units: Iterable[int]) -> list[int]:
        """Return the numbers of the layers that have any of `units`, in order."""
        return sorted({number for unit in units for number in self._having.get(unit, ())})

    def joined(self, units: dict[int, None]) -> dict[int, None]:
        """Return the closure of `units` under sharing a layer."""
        found, new = dict(units), units
        while new:
            others = (unit for number in self.having(new) for unit in self.own[number])
            new = {unit: None for unit in others if unit not in found}
            found |= new
        return found


def _free(roots: Tensor) -> dict[int, None]:
    return dict.fromkeys(root for root in roots.tolist() if root >= 0)
