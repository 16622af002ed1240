"""A model as evidence: its graphs, who calls each module, who reads each value.

`capture` never fails on a model. The root is traced; each submodule that cannot be is one opaque
call in its parent's graph, and its children are traced as regions of their own, to any depth.
Modules that no trace reached (another branch, a head for training) are regions too. Every module
that holds parameters is therefore seen in exactly one place, and two questions have honest answers:

    callers_known(name)   may code that was not traced also call this module?
    readers(node).known   may code that was not traced also read this value?
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from rewrite.graph.effects import Effects
from rewrite.graph.model_code import ModelCode
from rewrite.graph.untraced_branches import UntracedBranches
from rewrite.runtime.tree import Tree
from rewrite.tracing.records import Frame
from rewrite.tracing.records import Opaque as Opaque
from rewrite.tracing.regions import Region as Region
from rewrite.tracing.source_lines import short
from rewrite.tracing.tracer import hook_reasons

if TYPE_CHECKING:
    from rewrite.graph.editor import Editor
    from rewrite.runtime.inputs import ExampleCall


_NOT_TRACED = "is not called in any traced forward"


@dataclass(frozen=True)
class TensorRef:
    """A parameter, buffer or attribute: which module holds it, by qualified name, and its key."""

    owner: str
    attr: str

    @property
    def name(self) -> str:
        """The qualified name, as in a state dict."""
        return f"{self.owner}.{self.attr}" if self.owner else self.attr


@dataclass(frozen=True)
class Readers:
    """Who reads a value. `known` is False when code that was not traced may read it too."""

    nodes: tuple[Node, ...]
    known: bool
    reason: str = ""


@dataclass(eq=False)
class Captured:
    """A captured model. Built by `capture`; read by passes; edited through `editor`.

    Attributes:
        model: the module that was captured, itself (edits happen in place).
        tree: its modules under all their names.
        regions: the traced forwards, the model's own first if it could be traced.
        opaque: the modules that are one call to the tracer, with the reason.
        shape_error: why some values have no shape although example inputs were given.
        notes: what a pass has to say of the whole model; it goes into the report.
        exact: what tensors that a pass wrote are before they are rounded, in float64 and by
            qualified name; verification asks for them.
        example_calls: calls that may be observed, where a forward cannot be traced.
        observed: what these showed (`rewrite.observe`), once somebody asked.
    """

    model: nn.Module
    tree: Tree
    regions: tuple[Region, ...]
    opaque: dict[str, Opaque]
    shape_error: str | None = None
    notes: list[str] = field(default_factory=list)
    exact: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    example_calls: tuple[ExampleCall, ...] = ()
    observed: Any = field(default=None, repr=False)
    _class_words: dict[type, frozenset[str] | None] = field(default_factory=dict, repr=False)

    # -- modules ------------------------------------------------------------------------------

    def module(self, name: str) -> nn.Module:
        """Return the module called `name`."""
        return self.tree.get(name)

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return every other name of the module called `name`."""
        return self.tree.aliases(name)

    def calls(self, name: str) -> tuple[Node, ...]:
        """Return the `call_module` nodes of a module, over all regions."""
        return tuple(self._calls.get(self.tree.name(self.tree.get(name)), ()))

    def callers_known(self, name: str) -> bool:
        """Return whether every call of the module was seen (one caller, not one *known* caller)."""
        return self.unknown_caller(name) is None

    def unknown_caller(self, name: str) -> str | None:
        """Return who else may call the module, in words, or None if every call was seen."""
        name = self.tree.name(self.tree.get(name))
        if name in self._roots and name not in self.opaque:
            above = (p for place in (name, *self.aliases(name)) for p in _prefixes(place))
            cause = next((p for p in above if p in self._untraced), None)
            because = "" if cause is None else f": {self._opaque_words(cause)}"
            return f"{name} {_NOT_TRACED}{because}"
        return self.opaque_caller(name)

    def _opaque_words(self, name: str, does: str = "") -> str:
        opaque = self.opaque[name]
        return f"{name or 'the model'} is opaque{does} ({opaque.reason}{short(opaque.source)})"

    def opaque_caller(self, name: str) -> str | None:
        """Return which code that was read and not traced may call the module, in words, or None."""
        for place in (name, *self.tree.aliases(name)):
            for parent in _prefixes(place):
                if parent in self._untraced and self._mentions(parent, place):
                    return self._opaque_words(parent, f" and may call {place}")
            if (reason := self._untaken.caller(place)) is not None:
                return reason
        return None

    def hooks(self, name: str) -> tuple[str, ...]:
        """Return why a call of the module is more than its forward: hooks, parametrizations."""
        module = self.module(name)
        reasons = hook_reasons(module)
        if is_parametrized(module):
            keys = ", ".join(module.parametrizations)  # type: ignore[arg-type]
            reasons = (*reasons, f"has a parametrization of {keys}")
        elif module._forward_pre_hooks and not reasons:
            hook = type(next(iter(module._forward_pre_hooks.values()))).__name__
            reasons = (f"has a parametrization (old-style {hook})",)
        elif computed := [k for k in ("weight", "bias") if _is_property(module, k)]:
            reasons = (*reasons, f"computes its {computed[0]} by a property")
        return reasons

    # -- nodes --------------------------------------------------------------------------------

    def call_sites(self, node: Node) -> tuple[Node, ...]:
        """Return every call that the same layer or the same line of code makes, `node` included.

        A module that is called twice has two; so has a line of a forward that runs twice.
        """
        if node.op == "call_module":
            return self.calls(str(node.target))
        return tuple(n for n in self._lines[self._positions[node]] if n.op == node.op)

    def nodes(self) -> Iterator[Node]:
        """Yield every node of every region, in data-flow order within a region."""
        for region in self.regions:
            yield from region.graph.nodes

    def region_of(self, node: Node) -> Region:
        """Return the region that `node` belongs to."""
        return self._region_of_graph[node.graph]

    def owner(self, node: Node) -> str:
        """Return the name of the innermost module whose forward made the call."""
        return self.region_of(node).frames[node].owner

    def frame(self, node: Node) -> Frame:
        """Return the invocation of a forward that made the call."""
        return self.region_of(node).frames[node]

    def source(self, node: Node) -> str | None:
        """Return "file.py:123", the line of the model's code that made the call."""
        line = self.region_of(node).lines.get(node)
        return f"{line[0].co_filename}:{line[1]}" if line else None

    def source_text(self, node: Node) -> str:
        """Return the text of the line of the model's code that made the call, or ""."""
        line = self.region_of(node).lines.get(node)
        return linecache.getline(line[0].co_filename, line[1]).strip() if line else ""

    def readers(self, node: Node) -> Readers:
        """Return who reads the value of `node`, and whether those are all."""
        nodes = tuple(node.users)
        region = self.region_of(node)
        if any(user.op == "output" for user in nodes):
            where = region.name or "the model"
            return Readers(nodes, False, f"the value is returned by {where}")
        if (kept := region.kept.get(node)) is not None:
            return Readers(nodes, False, f"the value is kept as {kept}")
        if node.op == "call_module":
            for reason in self.hooks(str(node.target)):
                if "hook" in reason:
                    return Readers(nodes, False, f"{node.target} {reason}")
        if region.branches and region.frames[node].owner == region.name:
            names = ", ".join(region.branches)
            where = region.name or "the model"
            return Readers(nodes, False, f"the forward of {where} branches on its argument {names}")
        if (otherwise := self._untaken.reader(region, node)) is not None:
            return Readers(nodes, False, otherwise)
        return Readers(nodes, True)

    def shape(self, node: Node) -> torch.Size | None:
        """Return the shape of the value of `node`, known when example inputs were given."""
        value = node.meta.get("val")
        return value.shape if isinstance(value, torch.Tensor) else None

    # -- tensors ------------------------------------------------------------------------------

    def ref(self, node: Any) -> TensorRef | None:
        """Return the tensor that a `get_attr` node reads; None for anything else."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        owner, _, attr = str(node.target).rpartition(".")
        return TensorRef(owner, attr)

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """Return the tensor that `ref` names."""
        value = getattr(self.module(ref.owner), ref.attr)
        assert isinstance(value, torch.Tensor), f"{ref.name} is no tensor"
        return value

    def tied(self, ref: TensorRef) -> tuple[TensorRef, ...]:
        """Return every other place that holds the same tensor, or a view of the same storage."""
        tensor = self.tensor(ref)
        return tuple(other for other in self._holders.get(_storage(tensor), ()) if other != ref)

    def is_fixed(self, node: Node) -> bool:
        """Return whether a `get_attr` node is the same tensor at every call.

        It is not if a forward writes or assigns it, or makes it anew.
        """
        name = str(node.target)
        if name in self.effects.written_tensors or name in self.region_of(node).made:
            return False
        owner, _, attr = name.rpartition(".")
        return attr not in self.code.assigned(owner)

    @cached_property
    def code(self) -> ModelCode:
        """What the code of the model does with its modules, beside calling them."""
        entered = {name for region in self.regions for name in region.entered if region.name == ""}
        return ModelCode(self.tree, frozenset(entered | set(self._calls) - self._roots))

    @cached_property
    def effects(self) -> Effects:
        """What the traced forwards write, and which values share memory."""
        return Effects(self)

    # -- editing ------------------------------------------------------------------------------

    @cached_property
    def editor(self) -> Editor:
        """The one thing that changes the model."""
        from rewrite.graph.editor import Editor

        return Editor(self)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in every place of `old`, the root of the model included."""
        self.tree.replace(old, new)
        self.model = self.tree.model

    # -- indexes ------------------------------------------------------------------------------

    @cached_property
    def _positions(self) -> dict[Node, tuple[str, Any, int]]:
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
    def _lines(self) -> dict[Any, list[Node]]:
        lines: dict[Any, list[Node]] = {}
        for node, position in self._positions.items():
            lines.setdefault(position, []).append(node)
        return lines

    @cached_property
    def _untaken(self) -> UntracedBranches:
        return UntracedBranches(self.tree, self.regions)

    @cached_property
    def _region_of_graph(self) -> dict[Graph, Region]:
        return {region.graph: region for region in self.regions}

    @cached_property
    def _calls(self) -> dict[str, list[Node]]:
        calls: dict[str, list[Node]] = {}
        for node in self.nodes():
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        return calls

    @cached_property
    def _roots(self) -> frozenset[str]:
        """Roots of regions but the model itself: code that was not traced calls them."""
        return frozenset(region.name for region in self.regions if region.name)

    @cached_property
    def _untraced(self) -> frozenset[str]:
        """Modules whose own forward is not in any graph."""
        return frozenset(self.opaque) - frozenset(region.name for region in self.regions)

    @cached_property
    def _holders(self) -> dict[int, list[TensorRef]]:
        holders: dict[int, list[TensorRef]] = {}
        for name, module in self.tree.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None and not is_lazy(tensor):
                        holders.setdefault(_storage(tensor), []).append(TensorRef(name, key))
        return holders

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


def _is_property(module: nn.Module, key: str) -> bool:
    return isinstance(getattr(type(module), key, None), property)


def _words(kind: type) -> frozenset[str] | None:
    """Return the names and strings of a class's code (its bases' too); None if unknown."""
    words: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or base is object:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
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
        return ast.Module(body=inner, type_ignores=[])  # type: ignore[arg-type]


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules around `name`, innermost first, down to the root ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _storage(tensor: torch.Tensor) -> int:
    """Return what two tensors share if writing to one could write to the other."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return id(tensor)
    return id(tensor) if tensor.is_quantized else tensor.untyped_storage()._cdata
