"""Write the error of each ONNX node in the format that graph viewers overlay on a graph.

    error(node) = max over its outputs v of  min over the model's values u of |v - u| / |v|

The result is node data of Model Explorer: a value by node, under the names that the nodes have in
the file, so that Netron's search finds them too. A node that has no name, or that of another, goes
by the name that Model Explorer's ONNX adapter gives it (`NameFixPass`, which both run), and by its
first output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from torch import nn

from rewrite.equivalence.divergence import recorded
from rewrite.equivalence.record import Known, Sketcher
from rewrite.onnx.feeds import feed_of
from rewrite.onnx.file import open_onnx
from rewrite.onnx.values import record_graph
from rewrite.runtime.float64 import in_float64, short_of_memory
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.modes import evaluating, widen

_COLOURS = (("0", "#ffffff"), ("1", "#b42318"))


def node_errors(
    path: str | Path, model: nn.Module, example_inputs: Any, seed: int = 0
) -> dict[str, float]:
    """Return the relative error of each node that computes from the inputs, in the order it runs.

    Args:
        path: the ONNX file.
        model: what it should compute; run in float64, in eval mode.
        example_inputs: a tensor, a tuple of positional inputs, or a dict by name.
        seed: of the projections that values are compared by.

    Raises:
        VerificationError: the file cannot be read or run, or the inputs do not fit it.
    """
    opened = open_onnx(path)
    renamed = _name_nodes_(opened.model)
    inputs = Inputs.of(example_inputs)
    sketch = Sketcher(seed)
    graph = record_graph(opened, feed_of(opened, inputs), sketch)
    with evaluating(model), in_float64(model, streamed=short_of_memory(model)):
        exact, _ = recorded(model, inputs.map(widen), sketch, seed)
    known = Known(exact.values)
    errors = {
        event.owner: max(known.nearest(graph.values[number]).distance for number in event.outputs)
        for event in graph.events
        if event.outputs
    }
    return errors | {renamed[name]: error for name, error in errors.items() if name in renamed}


def _name_nodes_(model: onnx.ModelProto) -> dict[str, str]:
    """Give each node a name of its own; return the first output of each that is new."""
    named = ir.serde.deserialize_model(model)
    NameFixPass()(named)
    renamed: dict[str, str] = {}
    for node, own in zip(model.graph.node, named.graph, strict=True):
        if own.name and node.name != own.name:
            node.name = own.name
            renamed[own.name] = next(filter(None, node.output), own.name)
    return renamed


def node_data(errors: Mapping[str, float]) -> str:
    """Return the errors as node data of Model Explorer, JSON text.

    A node whose value the model never computes has no counterpart, and no value there.
    """
    results = {name: {"value": value} for name, value in errors.items() if math.isfinite(value)}
    gradient = [{"stop": float(stop), "bgColor": colour} for stop, colour in _COLOURS]
    return json.dumps({"results": results, "gradient": gradient}, indent=2) + "\n"
