"""What every propagation of an affine map needs to know of the graph around it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from rewrite.affine.layers import Layer, layer_of
from rewrite.affine.rules import PropagationRules
from rewrite.affine.tensor_readers import TensorReaders
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks


@dataclass
class AnalysisContext:
    """A captured model as growths read it. `folded` are nodes whose map has moved elsewhere.

    `gone` are the keys of norms whose affine part has moved elsewhere: they take up nothing more.
    """

    captured: Captured
    folded: dict[Node, Node]
    unshare: bool = False
    bake: bool = False

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
                layer = layer_of(self.captured, node, rank)
            if layer is not None and self.unshare and self._separable(layer):
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
        return not any(self.captured.editor.refusal(call, line=True) for call in calls)
