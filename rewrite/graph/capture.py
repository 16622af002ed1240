"""`capture`: a model to its graphs, with shapes, and an editor for what was found."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewrite.graph.captured import Captured
from rewrite.graph.regions import trace_regions
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.tree import Tree


def capture(model: nn.Module, example_inputs: Any = None) -> Captured:
    """Read `model` as graphs, without changing or running it.

    Args:
        model: any module, in any mode, on any device, also a GraphModule.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords; with them
            each node knows the shape of its value (fake tensors are propagated, nothing is
            computed).

    Returns:
        The captured model. What cannot be traced is in `opaque`, with the reason.
    """
    tree = Tree(model)
    regions, opaque = trace_regions(tree)
    captured = Captured(model, tree, tuple(regions), opaque)
    if example_inputs is not None:
        from rewrite.graph.shapes import propagate_shapes

        propagate_shapes(captured, Inputs.of(example_inputs))
    return captured
