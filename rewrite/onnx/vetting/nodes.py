"""The nodes of a graph, and the graphs inside of its nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx


def inner_graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs that a node holds: branches, and bodies of loops."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yield every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from all_nodes(inner)


def nodes_of(model: Any) -> Iterator[Any]:
    """Yield every node of a model: of its graph, of the graphs inside, of its functions."""
    for holder in (model.graph, *model.functions):
        yield from all_nodes(holder)


def label(node: Any) -> str:
    """Return what a message calls a node: its name, or what it computes."""
    return str(node.name) or f"{node.op_type} -> {', '.join(filter(None, node.output))}"
