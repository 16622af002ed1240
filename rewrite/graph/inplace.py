"""Which calls write into their first input: `x.relu_()`, `F.relu(x, inplace=True)`, `x += y`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from rewrite.graph.captured import Captured

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
    if node.target in (
        operator.iadd,
        operator.imul,
        operator.isub,
        operator.itruediv,
        operator.setitem,
    ):
        return True
    name = getattr(node.target, "__name__", "")
    return (
        bool(node.kwargs.get("inplace"))
        or (name.endswith("_") and not name.endswith("__"))
        or (
            name in ("relu", "relu6", "silu", "hardswish", "leaky_relu", "elu")
            and True in node.args[1:]
        )
    )
