"""One argument of a call, by position or by keyword."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
