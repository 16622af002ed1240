"""Sort modules by the order in which data flows through them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rewrite.graph.captured import Captured


def in_data_flow_order(captured: Captured) -> list[tuple[str, nn.Module]]:
    """Return every module by its first name, in the order of first calls, uncalled ones last."""
    first: dict[str, int] = {}
    for position, node in enumerate(captured.nodes()):
        if node.op == "call_module":
            name = captured.tree.name(captured.module(str(node.target)))
            first.setdefault(name, position)
    modules = list(captured.tree.modules())
    last = len(first) + sum(1 for _ in captured.nodes())
    # A child that only its opaque parent calls (attention's projection) stands with its parent.
    return sorted(modules, key=lambda item: _place(item[0], first, last))


def _place(name: str, first: Mapping[str, int], last: int) -> int:
    while name and name not in first:
        name = name.rpartition(".")[0]
    return first.get(name, last)
