"""Lookup tables of a captured model: calls by module, places by tensor, calls from opaque code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from rewrite.graph.refs import TensorRef
from rewrite.runtime.tree import Tree
from rewrite.tracing.code.source import source_of
from rewrite.tracing.records import Opaque
from rewrite.tracing.regions import Region
from rewrite.tracing.source_lines import short


class Index:
    """What is looked up in a captured model, each made when somebody first asks.

    Args:
        tree: the modules.
        regions: the traced forwards.
        opaque: the modules that are one call to the tracer.
    """

    def __init__(
        self, tree: Tree, regions: tuple[Region, ...], opaque: Mapping[str, Opaque]
    ) -> None:
        self.tree = tree
        self.regions = regions
        self.opaque = opaque
        self._class_words: dict[type, frozenset[str] | None] = {}

    @cached_property
    def positions(self) -> dict[Node, tuple[str, Any, int]]:
        """Per node: the owner, the target, and its order among equals in that invocation."""
        counts: dict[Any, int] = {}
        positions: dict[Node, tuple[str, Any, int]] = {}
        for region in self.regions:
            for node in region.graph.nodes:
                frame = region.frames[node]
                key = (region.name, frame, node.target)
                positions[node] = (frame.owner, node.target, counts.get(key, 0))
                counts[key] = counts.get(key, 0) + 1
        return positions

    @cached_property
    def lines(self) -> dict[Any, list[Node]]:
        """Every node by its position."""
        lines: dict[Any, list[Node]] = {}
        for node, position in self.positions.items():
            lines.setdefault(position, []).append(node)
        return lines

    @cached_property
    def region_of_graph(self) -> dict[Graph, Region]:
        """The region that each graph is of."""
        return {region.graph: region for region in self.regions}

    @cached_property
    def calls(self) -> dict[str, list[Node]]:
        """The `call_module` nodes of each module."""
        calls: dict[str, list[Node]] = {}
        for node in (n for region in self.regions for n in region.graph.nodes):
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        return calls

    @cached_property
    def returned(self) -> frozenset[Node]:
        """The values that some traced forward returns."""
        ends = (end for region in self.regions for end in region.graph.find_nodes(op="output"))
        return frozenset(value for end in ends for value in end.all_input_nodes)

    @cached_property
    def roots(self) -> frozenset[str]:
        """Roots of regions but the model itself: code that was not traced calls them."""
        return frozenset(region.name for region in self.regions if region.name)

    @cached_property
    def _untraced(self) -> frozenset[str]:
        """Modules whose own forward is not in any graph."""
        return frozenset(self.opaque) - frozenset(region.name for region in self.regions)

    @cached_property
    def shared(self) -> dict[int, list[TensorRef]]:
        """By storage, where several places hold a tensor in it: all of them."""
        first: dict[int, tuple[str, str]] = {}
        shared: dict[int, list[TensorRef]] = {}
        for name, module in self.tree.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is None or is_lazy(tensor):
                        continue
                    storage = storage_of(tensor)
                    if (before := first.setdefault(storage, (name, key))) != (name, key):
                        places = shared.setdefault(storage, [TensorRef(*before)])
                        places.append(TensorRef(name, key))
        return shared

    def opaque_around(self, place: str) -> str | None:
        """Return why the innermost module around `place` is opaque, in words, if one is."""
        cause = next((p for p in _prefixes(place) if p in self._untraced), None)
        return None if cause is None else self._opaque_words(cause)

    def opaque_caller(self, place: str) -> str | None:
        """Return which opaque module may call the one at `place`, in words, or None."""
        if not self._untraced:
            return None
        for parent in _prefixes(place):
            if parent in self._untraced and self._mentions(parent, place):
                return self._opaque_words(parent, f" and may call {place}")
        return None

    def _opaque_words(self, name: str, does: str = "") -> str:
        opaque = self.opaque[name]
        return f"{name or 'the model'} is opaque{does} ({opaque.reason}{short(opaque.source)})"

    def _mentions(self, parent: str, place: str) -> bool:
        """Return whether the code of an opaque module could call the module at `place`.

        A direct child always counts, and so does an item of one, which a loop can reach. A deeper
        module counts if its attribute name occurs in the code of the opaque class: a call must
        spell it.
        """
        parts = place[len(parent) :].lstrip(".").split(".") if parent else place.split(".")
        while len(parts) > 1 and parts[-1].isdigit():
            parts.pop()
        if len(parts) == 1:
            return True
        kind = type(self.tree.get(parent))
        if kind not in self._class_words:  # inspect.getsource parses the whole file of a class
            self._class_words[kind] = _words(kind)
        words = self._class_words[kind]
        return words is None or parts[-1].split("[")[0] in words


def _words(kind: type) -> frozenset[str] | None:
    """Return the names and strings of a class's code (its bases' too); None if unknown."""
    words: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or base is object:
            continue
        tree = source_of(base)
        if tree is None:
            return None
        words.update(_code_words(tree))
    return frozenset(words)


def _code_words(tree: ast.AST) -> Iterator[str]:
    """Yield attributes, names and the words of strings, but not those of documentation.

    What `__init__` writes runs once, before any call of the forward, but for its inner functions.
    """
    tree = _WithoutSetUp().visit(tree)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and id(node) not in prose:
            yield from re.findall(r"\w+", str(node.value))


class _WithoutSetUp(ast.NodeTransformer):
    """Leaves of `__init__` only the functions that it defines."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Keep a function whole, unless it is `__init__`."""
        if node.name != "__init__":
            return node
        kinds = ast.FunctionDef | ast.Lambda
        inner = [n for n in ast.walk(node) if isinstance(n, kinds) and n is not node]
        return ast.Module(body=inner, type_ignores=[])  # type: ignore[arg-type]  # statements are what a body holds


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules around `name`, innermost first, down to the root ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def storage_of(tensor: torch.Tensor) -> int:
    """Return what two tensors share if writing to one could write to the other."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return id(tensor)
    return id(tensor) if tensor.is_quantized else tensor.untyped_storage()._cdata
