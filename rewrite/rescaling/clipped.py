"""Clipping activations, which pass no scale: relu6, hardtanh from 0, clamp from 0.

min(max(x, 0), c)  →  max(x, 0)      another function where x > c
max(x, 0)                            a clamp or a threshold that is a ReLU, and passes every scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import activation_of
from rewrite.graph.traits import Call, argument, call_of
from rewrite.nn.modules import ChannelClip


@dataclass(frozen=True, eq=False)
class Clip:
    """One clipping activation.

    Attributes:
        target: the name of the module, or of the module whose forward calls the function.
        what: a short description.
        high: the upper bound c.
        nodes: its calls.
        refusal: why it cannot become a ReLU, or "".
    """

    target: str
    what: str
    high: float
    nodes: tuple[Node, ...]
    refusal: str = ""

    def replace(self, captured: Editable) -> None:
        """Replace it by a ReLU."""
        node = self.nodes[0]
        if node.op == "call_module":
            old = captured.module(self.target)
            captured.editor.replace(self.target, nn.ReLU(bool(getattr(old, "inplace", False))))
        else:
            captured.editor.substitute(node, nn.ReLU(), "relu")

    def bound(self, captured: Editable, bound: Tensor) -> str:
        """Replace it by a clip with one upper bound per channel, (C,); return the name of that."""
        return captured.editor.substitute(self.nodes[0], ChannelClip(bound), "clip")


def clips(captured: Captured) -> list[Clip]:
    """Return every clipping activation that is 0 below 0, in data-flow order."""
    found: list[Clip] = []
    seen: set[Node] = set()
    for node in captured.nodes():
        clipped = _clips(captured, node)
        if clipped is None or node in seen:
            continue
        what, high = clipped
        calls = captured.call_sites(node)
        seen.update(calls)
        target = str(node.target) if node.op == "call_module" else captured.owner(node)
        found.append(Clip(target, what, high, calls, _refusal(captured, node)))
    return found


def rectifies(call: Call) -> bool:
    """Return whether a call computes max(x, 0) as a clamp or a threshold."""
    if call.name == "threshold":
        return _is_zero(call.get("threshold")) and _is_zero(call.get("value"))
    if call.name not in ("clamp", "clamp_min"):
        return False
    return _is_zero(call.get("min")) and call.get("max") is None


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _refusal(captured: Captured, node: Node) -> str:
    if node.op == "call_module":
        name = str(node.target)
        reason = next(iter(captured.hooks(name)), None) or captured.unknown_caller(name)
        return reason or captured.code.used(name) or ""
    return captured.lines.refusal(node) or ""


def _clips(captured: Captured, node: Node) -> tuple[str, float] | None:
    """Return a description and the upper bound of a clipping activation, else None."""
    activation = activation_of(captured, node)
    if activation is not None and activation.name == "relu6":
        return "ReLU6", 6.0
    if activation is not None and activation.name == "hardtanh":
        if node.op == "call_module":
            module = captured.module(str(node.target))
            low, high = getattr(module, "min_val", -1.0), getattr(module, "max_val", 1.0)
        else:
            low = argument(node, 1, "min_val", -1.0)
            high = argument(node, 2, "max_val", 1.0)
        return _from_zero("Hardtanh from 0", low, high)
    call = call_of(captured, node)
    if call is None or call.name != "clamp":
        return None
    return _from_zero("clamp from 0", call.get("min"), call.get("max"))


def _from_zero(what: str, low: Any, high: Any) -> tuple[str, float] | None:
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    return (what, float(high)) if numbers and low == 0 and high > 0 else None
