"""Which calls write into their first input: `x.relu_()`, `F.relu(x, inplace=True)`, `x += y`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.graph.traits import call_of

_WRITES = (
    operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.setitem,
)  # fmt: skip


_AUGMENTED: Mapping[Any, str] = {
    operator.add: "+=", operator.sub: "-=", operator.mul: "*=", operator.truediv: "/=",
}  # fmt: skip


def changes_in_place(captured: Captured, node: Node) -> bool:
    """Return whether `node` writes into its first input."""
    if node.op == "call_module":
        return bool(getattr(captured.module(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _AUGMENTED:
        # A proxy records `x += y` as `x + y`: only the line of code tells them apart.
        return _AUGMENTED[node.target] in captured.source_text(node)
    if node.target in _WRITES or node.kwargs.get("out") is not None:
        return True
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    name = getattr(packet, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    call = call_of(captured, node)
    return call is not None and call.get("inplace", False) is True
