"""Export with PyTorch's older TorchScript exporter, where the newer one fails.

A trace is what one input did: a branch that depends on values, a number of detections or of steps
stays as it was there. It is therefore asked for by name, and verified on more than one input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import nn

from rewrite.files import scratch_folder
from rewrite.runtime.inputs import Inputs

NEWEST_OPSET = 20
"""The last one that this exporter writes."""


_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class TracedProgram:
    """A traced graph, to be written like an exported one."""

    model: Any

    def save(self, path: str, *, external_data: bool) -> None:
        """Write the graph to `path`, its weights into a file beside it on request."""
        onnx_ir.save(
            self.model, path, external_data=f"{Path(path).name}.data" * external_data or None
        )


def trace_to_onnx(
    model: nn.Module,
    inputs: Inputs,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    opset: int,
) -> TracedProgram:
    """Return the graph of a trace, with PyTorch's qualified name on each node."""
    with scratch_folder() as folder:
        place = folder / "traced.onnx"
        torch.onnx.export(
            model,
            inputs.args,
            str(place),
            kwargs=dict(inputs.kwargs) or None,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_axes={name: dict(axes) for name, axes in dynamic_axes.items()},
            opset_version=opset,
            dynamo=False,
        )
        traced = onnx_ir.load(place)
        onnx_ir.external_data.load_to_model(traced)
    modules = dict(model.named_modules())
    for node in traced.graph.all_nodes():
        if (owner := _owner(node.name or "")) in modules:
            node.metadata_props[_SCOPES] = str(["", owner, node.name])
    return TracedProgram(traced)


def _owner(name: str) -> str:
    """Return the module that a node's name tells of.

    "/layer1/layer1.0/conv1/Conv" is a node of layer1.0.conv1: a scope in a container repeats the
    container's name.
    """
    owner = before = ""
    for scope in name.split("/")[1:-1]:
        parent = owner.removesuffix(before) if scope.startswith(f"{before}.") else f"{owner}."
        owner, before = parent + scope if owner else scope, scope
    return owner
