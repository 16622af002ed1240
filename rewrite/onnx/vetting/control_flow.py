"""Judge the form of branches and loops, before anything follows their bodies.

If(condition): then_branch, else_branch      Loop(rounds, going, …): body
Scan(…): body, num_scan_inputs <= inputs     one scan_input_axes for each of them, or none
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import AttributeProto

from rewrite.errors import VerificationError
from rewrite.onnx.vetting.nodes import all_nodes, label

_BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}
_FEWEST_INPUTS = {"If": 1, "Loop": 2, "Scan": 1}


def check_control_flow(place: Path, graph: Any) -> None:
    """Raise VerificationError for a branch or a loop that lacks what makes it one.

    Args:
        place: the file, for messages.
        graph: it, with the graphs inside its nodes.
    """
    for node in all_nodes(graph):
        if node.op_type in _BODIES and (wrong := _wrong(node)):
            raise VerificationError(f"{place}: {label(node)}: {wrong}; export it again")


def _wrong(node: Any) -> str:
    kind = node.op_type
    attributes = {attribute.name: attribute for attribute in node.attribute}
    for name in _BODIES[kind]:
        if name not in attributes or attributes[name].type != AttributeProto.GRAPH:
            return f"{kind} has no {name}"
    if len(node.input) < _FEWEST_INPUTS[kind]:
        return f"{kind} has {len(node.input)} inputs, at least {_FEWEST_INPUTS[kind]} are needed"
    if kind != "Scan":
        return ""
    scanned = attributes["num_scan_inputs"].i if "num_scan_inputs" in attributes else 0
    if not 1 <= scanned <= len(node.input):
        return f"Scan has {len(node.input)} inputs, and num_scan_inputs is {scanned}"
    axes = attributes["scan_input_axes"].ints if "scan_input_axes" in attributes else ()
    if len(axes) not in (0, scanned):
        return f"Scan has {len(axes)} scan_input_axes for {scanned} inputs"
    return ""
