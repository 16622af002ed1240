"""The affine maps of a network folded on paper: new tensors beside the model, which stays.

What `fold` would do to norms and constants, without an edit: calls that pass their input on, and
the tensors that layers would hold, in the dtype of the model.
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
    """What a fold makes of a captured model.

    Attributes:
        passes_on: calls that are gone, and the value that each passes on.
        tensors: the new weight and bias of each layer that absorbed a map, by the layer's key.
        planner: knows the layer of a call; None where nothing is folded.
    """

    passes_on: Mapping[Node, Node] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    planner: Planner | None = None

    def of(self, node: Node) -> Mapping[str, Tensor]:
        """Return the new tensors of the layer that a node calls."""
        layer = None if self.planner is None else self.planner.layer(node)
        return {} if layer is None else self.tensors.get(layer.key, {})


def fold_on_paper(captured: Captured) -> FoldedTensors:
    """Return what folding every norm and constant of a model in float64 gives.

    A norm right behind the only layer that it normalizes is left to the caller, if all are.
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
    """Return whether a norm or a constant is more than the last step of one layer."""
    norm = norm_of(captured, node)
    if norm is not None:
        source = norm.input
        layer = conv_of(captured, source) or linear_of(captured, source)
        return norm.kind in ("batch", "instance") and (layer is None or len(source.users) > 1)
    constants = any(operand.op == "get_attr" for operand in node.all_input_nodes)
    return constants and has(node, Trait.ADDS)
