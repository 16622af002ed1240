"""Which channels of a network share one positive scale, found through its graph.

    y = W x      W → D_out W D_in⁻¹                 inputs and outputs have scales of their own
    y = γ n(x)   γ → D_out γ                        any norm: its input keeps its scale
    y = f(x)     f(d x) = d f(x): relu, pooling     one scale before and behind
    y = x + z    one scale for all three            all of a residual stream has one a channel
    y = x + b    b a tensor of the model: scaled as x is (`rewrite.rescaling.scaled_operations`)
    y = [x, z]   each its own part
    y = x g      g a gate or a constant: x and y share, g keeps its scale

What reaches an input, an output, code that was not traced, or any other operation keeps scale 1.
Every value of every traced forward is visited once, in data-flow order; calls of one layer share
its scales.
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
    """Channels of values that belong together, and the layers around them.

    Attributes:
        target: the first layer that writes them.
        units: the roots of their free scales, in the order of its channels.
        writers, readers: the layers that would change, in data-flow order.
        beside: tensors that are scaled as these channels are.
    """

    target: str
    units: Tensor
    writers: tuple[ScaledLayer, ...]
    readers: tuple[ScaledLayer, ...]
    beside: tuple[ScaledLayer, ...] = ()


class Scales:
    """The scales of one captured model.

    Args:
        captured: the model; with shapes more of it can be followed.
        clipped: calls of clipping activations that become ReLU, and so pass a scale.
        other: the model in its other mode, where that runs other lines; a scale has to suit both.
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
        """Visit the model in another mode, with the units and the layers of the first."""
        made = cls.__new__(cls)
        made.captured, made.planner = other, Planner(other)
        made.units, made.layers, made._maps = scales.units, scales.layers, {}
        made._operations = ScaledOperations(made.planner, made.units, made._maps, clipped)
        for node in other.nodes():
            made._visit(node)
        return made

    def _join(self, other: Scales) -> None:
        """Keep what only the other mode reads as it is."""
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
        """Return how the channels of a value lie, and their labels; None if it is not followed."""
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
    """Which layers have which free units, looked up by unit."""

    def __init__(self, own: Sequence[dict[int, None]]) -> None:
        self.own = own
        self._having: dict[int, list[int]] = defaultdict(list)
        for number, units in enumerate(own):
            for unit in units:
                self._having[unit].append(number)

    def having(self, units: Iterable[int]) -> list[int]:
        """Return the numbers of the layers that have one of `units`, in their order."""
        return sorted({number for unit in units for number in self._having.get(unit, ())})

    def joined(self, units: dict[int, None]) -> dict[int, None]:
        """Return `units` with all others of the layers that have one of them, and so on."""
        found, new = dict(units), units
        while new:
            others = (unit for number in self.having(new) for unit in self.own[number])
            new = {unit: None for unit in others if unit not in found}
            found |= new
        return found


def _free(roots: Tensor) -> dict[int, None]:
    return dict.fromkeys(root for root in roots.tolist() if root >= 0)
