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
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from rewrite.tracer import (
    Frame,
    Opaque,
    RegionTracer,
    Trace,
    hook_reasons,
    is_leaf,
    reason_of,
    tracing,
)
from rewrite.tree import Tree, slots, tensor_names

if TYPE_CHECKING:
    from rewrite.edit import Editor

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
class Region:
    """One traced forward: the root of the model, or of a part below an opaque module.

    Attributes:
        name: qualified name of the module whose forward was traced; "" for the model.
        graph: the fx graph; targets are qualified names of the whole model.
        assumed: parameters of the forward that were taken at their defaults.
        branches: those of them that the forward's own code branches on.
        frames, lines: per node, the forward that made the call and the line of its code.
        constants: tensors of the graph that no module holds.
        entered: the modules whose forward this trace went through.
    """

    name: str
    graph: Graph
    assumed: dict[str, Any] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    frames: dict[Node, Frame] = field(default_factory=dict)
    lines: dict[Node, Any] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    entered: frozenset[str] = frozenset()


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
    """

    model: nn.Module
    tree: Tree
    regions: tuple[Region, ...]
    opaque: dict[str, Opaque]
    shape_error: str | None = None
    notes: list[str] = field(default_factory=list)

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
            return f"{name} {_NOT_TRACED}"
        for place in (name, *self.tree.aliases(name)):
            for parent in _prefixes(place):
                if parent in self._untraced and self._mentions(parent, place):
                    return f"{parent or 'the model'} is opaque and may call {place}"
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
        return reasons

    # -- nodes --------------------------------------------------------------------------------

    def twins(self, node: Node) -> tuple[Node, ...]:
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
        if node.op == "call_module":
            for reason in self.hooks(str(node.target)):
                if "hook" in reason:
                    return Readers(nodes, False, f"{node.target} {reason}")
        if region.branches and region.frames[node].owner == region.name:
            names = ", ".join(region.branches)
            where = region.name or "the model"
            return Readers(nodes, False, f"the forward of {where} branches on its argument {names}")
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

    # -- editing ------------------------------------------------------------------------------

    @cached_property
    def editor(self) -> Editor:
        """The one thing that changes the model."""
        from rewrite.edit import Editor

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
        words = _words(type(self.tree.get(parent)))
        return words is None or parts[-1].split("[")[0] in words


def capture(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Captured:
    """Read `model` as graphs, without changing or running it.

    Args:
        model: any module, in any mode, on any device, also a GraphModule.
        example_inputs: positional inputs; with them each node knows the shape of its value
            (fake tensors are propagated, nothing is computed).

    Returns:
        The captured model. What cannot be traced is in `opaque`, with the reason.
    """
    tree = Tree(model)
    regions, opaque = _trace_regions(tree)
    captured = Captured(model, tree, tuple(regions), opaque)
    if example_inputs is not None:
        from rewrite.shapes import propagate_shapes

        propagate_shapes(captured, example_inputs)
    return captured


def _trace_regions(tree: Tree) -> tuple[list[Region], dict[str, Opaque]]:
    opaque: dict[str, Opaque] = {}
    regions: list[Region] = []
    seen: set[str] = set()
    expanded: set[str] = set()
    tracer = RegionTracer(tree, tensor_names(tree), opaque)

    def visit(root: nn.Module) -> None:
        pending = [root]
        while pending:
            module = pending.pop()
            name = tree.name(module)
            if name in seen and not (_is_boundary(opaque.get(name)) and name in expanded):
                continue
            seen.add(name)
            region = _trace_root(tracer, module, name)
            if region is None:
                expanded.add(name)
                pending.extend(_children(module))
                continue
            regions.append(region)
            called = {str(n.target) for n in region.graph.nodes if n.op == "call_module"}
            seen.update(called, region.entered)
            for inner in reversed([n for n in called if n in opaque and n not in expanded]):
                expanded.add(inner)
                module = tree.get(inner)
                pending.extend([module] if _is_boundary(opaque[inner]) else _children(module))

    with tracing(tree):
        visit(tree.model)
        # What no trace reached: another branch, a training head, the inside of a torch.nn block.
        for name, module in tree.modules():
            if name not in seen and ".parametrizations." not in f".{name}.":
                visit(module)
    return regions, opaque


def _is_boundary(item: Opaque | None) -> bool:
    """Return whether a module is opaque only because hooks watch it: its forward can be traced."""
    return item is not None and item.source is None and item.reason.endswith("hook")


def _children(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for _, child in slots(module):
        if not _has_forward(child) or isinstance(child, nn.ModuleList):
            found.extend(_children(child))
        else:
            found.append(child)
    return found[::-1]


def _has_forward(module: nn.Module) -> bool:
    """Return whether the class has a forward; looking it up on a ScriptModule's class raises."""
    return inspect.getattr_static(type(module), "forward") is not nn.Module.forward


def _trace_root(tracer: RegionTracer, module: nn.Module, name: str) -> Region | None:
    opaque = tracer.opaque
    if name in opaque and not _is_boundary(opaque[name]):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        opaque[name] = Opaque(name, "is a TorchScript module", None)
        return None
    if not _has_forward(module):
        return None
    if is_leaf(module):
        return _leaf_region(module, name)
    if "forward" in vars(module):
        opaque[name] = Opaque(name, "has a forward that was set on the instance", None)
        return None
    assumed = forward_defaults(module)
    try:
        trace = tracer.run(module, assumed)
    except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
        opaque[name] = Opaque(name, *reason_of(error))
        return None
    return _region(name, trace, assumed, forward_branches(module, assumed))


def _region(name: str, trace: Trace, assumed: dict[str, Any], branches: tuple[str, ...]) -> Region:
    alive = set(trace.graph.nodes)
    frames = {node: frame for node, frame in trace.frames.items() if node in alive}
    entered = frozenset(trace.entered)
    return Region(
        name, trace.graph, assumed, branches, frames, trace.lines, trace.constants, entered
    )


def _leaf_region(module: nn.Module, name: str) -> Region:
    """Return the region of a standard layer that some opaque code calls: input, call, output."""
    graph = Graph()
    inputs = [
        graph.placeholder(parameter.name)
        for parameter in inspect.signature(type(module).forward).parameters.values()
        if parameter.name != "self" and parameter.default is parameter.empty
    ]
    call = graph.call_module(name, tuple(inputs))
    output = graph.output(call)
    parent = name.rpartition(".")[0]
    frames = {node: Frame(parent, 0) for node in (*inputs, call, output)}
    return Region(name, graph, frames=frames)


def forward_defaults(module: nn.Module) -> dict[str, Any]:
    """Return the forward's parameters that have defaults: a trace takes those.

    Where every parameter has one, the first is an input all the same: `forward(pixel_values=None)`
    computes nothing without it.
    """
    parameters = [
        p
        for p in inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
        if p.name != "self"
    ]
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    inputs = required or parameters[:1]
    return {p.name: p.default for p in parameters if p not in inputs and p.default is not p.empty}


def forward_branches(module: nn.Module, assumed: dict[str, Any]) -> tuple[str, ...]:
    """Return the assumed parameters that the forward's code tests: it may do something else."""
    if not assumed:
        return ()
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return tuple(assumed)
    tested: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            tested |= {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.BoolOp):
            tested |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return tuple(name for name in assumed if name in tested)


@lru_cache(maxsize=4096)  # inspect.getsource parses the whole file of a class
def _words(kind: type) -> frozenset[str] | None:
    """Return every word of a class's code (its bases' too, up to nn.Module); None if unknown."""
    words: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or base is object:
            continue
        try:
            words.update(re.findall(r"\w+", inspect.getsource(base)))
        except (OSError, TypeError):
            return None
    return frozenset(words)


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
