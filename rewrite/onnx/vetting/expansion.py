"""Count what a graph becomes when its functions are inlined, before anything inlines them.

    nodes(body) = sum over its nodes of   nodes(function) where it calls one, else 1
                                        + sum of nodes(inner graph)

Each function is counted once, so 32 functions that each call the one before twice, 2**32 nodes in
2 kB, take no longer than 32 that do not. What is out of proportion to the file is refused: the
checker, shape inference and onnxruntime all inline before they look.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from rewrite.errors import VerificationError
from rewrite.onnx.vetting.nodes import inner_graphs, label

MOST_NODES, MOST_TIMES = 100_000, 20
"""A graph may become so many nodes, or so many times those that its file holds."""

MOST_GRAPHS = 4096
"""So many graphs may lie inside of nodes: each one is looked up, typed and planned by itself."""

MOST_DEPTH = 100
"""So many functions may be inside of each other."""


def check_expansion(place: Path, model: onnx.ModelProto) -> None:
    """Raise VerificationError where a graph grows out of proportion to its file.

    Raises:
        VerificationError: functions call each other in a circle, or become too many nodes when
            they are inlined; or too many graphs lie inside of nodes.
    """
    graphs = sum(1 for _ in _graphs_inside(model))
    if graphs > MOST_GRAPHS:
        raise VerificationError(
            f"{place}: holds {graphs} graphs inside of its nodes, at most {MOST_GRAPHS} are taken; "
            "export it with constant conditions resolved"
        )
    if not model.functions:
        return
    counting = _Expansion(place, model)
    held = sum(_stored(body) for body in (model.graph, *model.functions))
    most = max(MOST_NODES, MOST_TIMES * held)
    total = 0
    for node in model.graph.node:
        total += counting.of_node(node)
        if total > most:
            raise VerificationError(
                f"{place}: {label(node)}: the file holds {held} nodes, and its functions make at "
                f"least {total:.3g} of them, at most {most} are taken; inline the functions once"
            )


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that `check_expansion` took, without calls of functions of its own."""
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError):
        return model  # the checker tells of it


class _Expansion:
    """How many nodes each function becomes, each counted once."""

    def __init__(self, place: Path, model: onnx.ModelProto) -> None:
        self.place = place
        self.functions = {_key(function): function for function in model.functions}
        self.counts: dict[tuple[str, str, str], int] = {}
        self.open: set[tuple[str, str, str]] = set()

    def of_node(self, node: Any) -> int:
        """Return how many nodes a node becomes, those inside of it included."""
        inside = sum(self.of_node(n) for graph in inner_graphs(node) for n in graph.node)
        for key in (_called(node), (*_called(node)[:2], "")):
            if key in self.functions:
                return self._of_function(key, node) + inside
        return 1 + inside

    def _of_function(self, key: tuple[str, str, str], node: Any) -> int:
        if key in self.open:
            raise VerificationError(
                f"{self.place}: {label(node)}: the function {key[1]} calls itself, and never ends"
            )
        if len(self.open) >= MOST_DEPTH:
            raise VerificationError(
                f"{self.place}: {label(node)}: functions call each other more than {MOST_DEPTH} "
                "deep; inline them once"
            )
        if key not in self.counts:
            self.open.add(key)
            self.counts[key] = sum(self.of_node(inner) for inner in self.functions[key].node)
            self.open.remove(key)
        return self.counts[key]


def _called(node: Any) -> tuple[str, str, str]:
    # An overload is new in version 10 of the format; older libraries do not know the field.
    return (_domain(node), node.op_type, getattr(node, "overload", ""))


def _key(function: Any) -> tuple[str, str, str]:
    return (_domain(function), function.name, getattr(function, "overload", ""))


def _domain(of: Any) -> str:
    return "" if of.domain == "ai.onnx" else str(of.domain)


def _stored(body: Any) -> int:
    """Return how many nodes a graph or a function holds in the file."""
    return sum(1 + sum(_stored(graph) for graph in inner_graphs(node)) for node in body.node)


def _graphs_inside(model: onnx.ModelProto) -> Iterator[Any]:
    bodies: list[Any] = [model.graph, *model.functions]
    while bodies:
        for node in bodies.pop().node:
            for graph in inner_graphs(node):
                yield graph
                bodies.append(graph)
