"""What a propagation is asked for, and what it needs to know of the graph around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from rewrite.affine.channel_map import Direction
from rewrite.affine.layers import Layer, Side, attention_layer, layer_of, product_layer
from rewrite.affine.rules import PropagationRules
from rewrite.affine.tensor_readers import TensorReaders
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks


@dataclass(frozen=True, eq=False)
class MapRequest:
    """A map y = s.x + t that is to be absorbed.

    Attributes:
        direction: whether what produces x absorbs it, or what reads y.
        values: per call that the map stands at, the value that is mapped.
        axis: of the channels in those values.
        channels: how many there are.
        scale, shift: which parts the map has.
        positive: every scale is positive.
        absorb_inverse: layers that the change meets against its direction may absorb the inverse.
    """

    direction: Direction
    values: Mapping[Node, Node]
    axis: int
    channels: int
    scale: bool = True
    shift: bool = True
    positive: bool = False
    absorb_inverse: bool = False

    @property
    def side(self) -> Side:
        """The side of each call on which the mapped value lies."""
        return Side.INPUT if self.direction is Direction.BACKWARD else Side.OUTPUT


@dataclass
class AnalysisContext:
    """A captured model as propagations read it. `folded` are nodes whose map has moved elsewhere.

    `gone` are the keys of norms whose affine part has moved elsewhere: they absorb nothing more.
    With `products`, so is a layer what multiplies by a weight and adds a bias that is computed.
    """

    captured: Captured
    folded: dict[Node, Node]
    clone_shared: bool = False
    bake: bool = False
    products: bool = False

    def __post_init__(self) -> None:
        self.ranks = Ranks(self.captured)
        self.tensor_readers = TensorReaders(self.captured, self.bake)
        self.rules = PropagationRules(self.captured, self.ranks, self.folded)
        self.order = {node: place for place, node in enumerate(self.captured.nodes())}
        self.gone: set[str] = set()
        self._layers: dict[Node, Layer | None] = {}

    def layer(self, node: Node) -> Layer | None:
        """Return the layer that `node` calls, or None."""
        if node not in self._layers:
            inputs = node.all_input_nodes
            rank = self.ranks.rank(inputs[0]) if inputs else None
            layer = None
            if node.op in ("call_module", "call_function"):
                layer = layer_of(self.captured, node, rank) or attention_layer(self.captured, node)
                if layer is None and self.products:
                    layer = product_layer(self.captured, node)
            if layer is not None and self.clone_shared and self._separable(layer):
                layer = replace(layer, call=node)
            self._layers[node] = layer
        return self._layers[node]

    def _separable(self, layer: Layer) -> bool:
        """Return whether each call of a shared layer stands on a line of its own."""
        if layer.module is None or layer.kind != "kernel" or self.captured.hooks(layer.module):
            return False
        calls = self.captured.calls(layer.module)
        frames = {self.captured.frame(call) for call in calls}
        if len(calls) < 2 or len({frame.owner for frame in frames}) < len(frames):
            return False
        return not any(self.captured.lines.refusal(call, line=True) for call in calls)
