"""`capture`: trace a model into graphs with shapes, and attach an editor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rewrite.errors import CaptureError
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.runtime.inputs import ExampleCall, Inputs
from rewrite.runtime.tree import Tree
from rewrite.tracing.regions import trace_regions


def capture(
    model: nn.Module, example_inputs: Any = None, calls: Sequence[ExampleCall] = ()
) -> Editable:
    """Read `model` as graphs, without changing or running it.

    Args:
        model: any module, in any mode, on any device, also a GraphModule.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords; with them
            each node knows the shape of its value, and branches on sizes are followed. Nothing is
            computed: a stand-in without numbers is run.
        calls: calls that may be observed, where a forward cannot be traced.

    Returns:
        The captured model. What cannot be traced is in `opaque`, with the reason.

    Raises:
        CaptureError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a {type(model).__name__} is no torch.nn.Module: pass a model")
    tree = Tree(model)
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    traced = trace_regions(tree, inputs)
    found = Captured(
        model, tree, traced.regions, traced.opaque, traced.error, traced.altered,
        example_calls=tuple(calls),
    )  # fmt: skip
    found.example_inputs = inputs
    return Editable.of(found)
