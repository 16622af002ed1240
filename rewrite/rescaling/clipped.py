"""Clipping activations, which pass no scale: relu6, hardtanh from 0, clamp from 0.

min(max(x, 0), c)  →  max(x, 0)      another function where x > c
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import activation_of
from rewrite.graph.traits import argument, call_of


@dataclass(frozen=True, eq=False)
class Clip:
    """One clipping activation.

    Attributes:
        target: the module, or that whose forward holds the line.
        what: it in a few words.
        nodes: its calls.
        refusal: why it cannot become a ReLU, or "".
    """

    target: str
    what: str
    nodes: tuple[Node, ...]
    refusal: str = ""

    def replace(self, captured: Editable) -> None:
        """Put a ReLU in its place."""
        node = self.nodes[0]
        if node.op == "call_module":
            old = captured.module(self.target)
            captured.editor.replace(self.target, nn.ReLU(bool(getattr(old, "inplace", False))))
        else:
            captured.editor.substitute(node, nn.ReLU(), "relu")


def clips(captured: Captured) -> list[Clip]:
    """Return every clipping activation that is 0 below 0, in data-flow order."""
    found: list[Clip] = []
    seen: set[Node] = set()
    for node in captured.nodes():
        what = _clips(captured, node)
        if what is None or node in seen:
            continue
        calls = captured.call_sites(node)
        seen.update(calls)
        target = str(node.target) if node.op == "call_module" else captured.owner(node)
        found.append(Clip(target, what, calls, _refusal(captured, node)))
    return found


def _refusal(captured: Captured, node: Node) -> str:
    if node.op == "call_module":
        name = str(node.target)
        return next(iter(captured.hooks(name)), None) or captured.unknown_caller(name) or ""
    return captured.lines.refusal(node) or ""


def _clips(captured: Captured, node: Node) -> str | None:
    """Return what a node clips, in words, or None."""
    activation = activation_of(captured, node)
    if activation is not None and activation.name == "relu6":
        return "ReLU6"
    if activation is not None and activation.name == "hardtanh":
        if node.op == "call_module":
            module = captured.module(str(node.target))
            low = getattr(module, "min_val", -1.0)
        else:
            low = argument(node, 1, "min_val", -1.0)
        return "Hardtanh from 0" if low == 0 else None
    call = call_of(captured, node)
    if call is None or call.name != "clamp" or call.get("min") != 0:
        return None
    high = call.get("max")
    return "clamp from 0" if isinstance(high, int | float) and high > 0 else None
