"""`capture`: trace a model into graphs with shapes, and attach an editor."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from rewrite.errors import CaptureError
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.runtime.inputs import ExampleCall, Inputs
from rewrite.runtime.tree import Tree
from rewrite.tracing.regions import Region, trace_regions


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
        traced.ran, example_calls=tuple(calls), example_inputs=inputs,
    )  # fmt: skip
    return Editable.of(found)


def in_other_mode(captured: Captured) -> Captured | None:
    """Return the model as it runs in its other mode, training or eval; None if it runs alike.

    A pass that promises equality in both modes has to know what reads a value in either. The model
    is neither changed nor run. Modes of layers (dropout, a batch norm) are no difference by
    themselves: calls and what they read are compared.
    """
    traced = trace_regions(captured.tree, captured.example_inputs, other_mode=True)
    if _alike(captured.regions, traced.regions):
        return None
    found = Captured(
        captured.model, captured.tree, traced.regions, traced.opaque, traced.error, traced.altered,
        traced.ran, example_inputs=captured.example_inputs,
    )  # fmt: skip
    found.numbers = captured.numbers
    return found


def _alike(regions: Sequence[Region], others: Sequence[Region]) -> bool:
    names = [region.name for region in regions], [region.name for region in others]
    if names[0] != names[1]:
        return False
    return all(map(operator.eq, map(_form, regions), map(_form, others)))


def _form(region: Region) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return what each node of a region calls, and which nodes it reads."""
    places = {node: index for index, node in enumerate(region.graph.nodes)}
    return [
        (node.op, str(node.target), tuple(places[n] for n in node.all_input_nodes))
        for node in region.graph.nodes
    ]
