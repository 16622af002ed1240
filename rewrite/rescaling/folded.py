"""The result of a fold without editing the model: its new tensors, and the calls it removes.

What `fold` would do to norms and constants: which calls become the identity, and which tensors the
layers would hold, in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from rewrite.affine.layers import Layer
from rewrite.affine.planner import Planner
from rewrite.fold.candidates import sources
from rewrite.fold.folder import Folder
from rewrite.graph.captured import Captured
from rewrite.graph.operators import conv_of, linear_of, norm_of
from rewrite.graph.traits import Trait, has


@dataclass(frozen=True)
class FoldedTensors:
    """The result of folding a captured model.

    Attributes:
        passes_on: the calls that become the identity, each with the value that it returns.
        tensors: the new weight and bias of each layer that absorbed a map, by the layer's key.
        planner: finds the layer of a call; None if nothing is folded.
    """

    passes_on: Mapping[Node, Node] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    planner: Planner | None = None

    def of(self, node: Node) -> Mapping[str, Tensor]:
        """Return the new tensors of the layer that a node calls."""
        layer = None if self.planner is None else self.planner.layer(node)
        return {} if layer is None else self.tensors.get(layer.key, {})


def fold_on_paper(captured: Captured) -> FoldedTensors:
    """Fold every norm and constant of a model in float64, without editing it.

    If every norm directly follows the only layer that it normalizes, nothing is folded here: the
    caller treats such pairs as one layer.
    """
    if not any(_stands_apart(captured, node) for node in captured.nodes()):
        return FoldedTensors()
    folder = Folder(captured, products=False)
    for source in sources(folder.planner):
        if source.kind in ("norm", "constant"):
            folder.decide(source)
    tensors: dict[str, dict[str, Tensor]] = {}

    def write(layer: Layer, attr: str, tensor: Tensor) -> None:
        tensors.setdefault(layer.key, {})[attr] = tensor

    folder.ledger.write(write)
    return FoldedTensors(dict(folder.planner.folded), tensors, folder.planner)


def _stands_apart(captured: Captured, node: Node) -> bool:
    """Return whether a norm or constant is anything but the last step of a single layer."""
    norm = norm_of(captured, node)
    if norm is not None:
        source = norm.input
        layer = conv_of(captured, source) or linear_of(captured, source)
        return norm.kind in ("batch", "instance") and (layer is None or len(source.users) > 1)
    constants = any(operand.op == "get_attr" for operand in node.all_input_nodes)
    return constants and has(node, Trait.ADDS)
