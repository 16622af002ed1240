"""Split a model into traced regions: the root forward, and forwards below untraceable modules."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from rewrite.runtime.copying import lazy_copy
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.stand_in import stand_in, without_values
from rewrite.runtime.tree import Tree, slots, tensor_names
from rewrite.tracing.altered import Layers
from rewrite.tracing.code.functions_run import FunctionsRun
from rewrite.tracing.code.source import source_of
from rewrite.tracing.decisions import real_decisions
from rewrite.tracing.patches import tracing
from rewrite.tracing.records import Decision, Frame, Opaque, Trace
from rewrite.tracing.shapes import Shapes
from rewrite.tracing.source_lines import reason_of
from rewrite.tracing.tracer import RegionTracer, is_leaf


@dataclass(eq=False)
class Region:
    """One traced forward: the root of the model, or of a part below an opaque module.

    Attributes:
        name: qualified name of the module whose forward was traced; "" for the model.
        graph: the fx graph; targets are qualified names of the whole model.
        assumed: parameters of the forward that were taken at their defaults.
        branches: those of the assumed parameters that the forward's own code branches on.
        frames, lines: per node, the forward that made the call and the line of its code.
        constants: tensors of the graph that no module holds.
        made: those of them that the forward creates or writes to at each call.
        entered: the modules whose forward this trace went through.
        kept: the values that a forward assigns to attributes, and to which.
        decisions: lines that needed a size as a number, and may branch on it.
        augmented: the nodes of augmented assignments, `x += y` and its like.
    """

    name: str
    graph: Graph
    assumed: dict[str, Any] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    frames: dict[Node, Frame] = field(default_factory=dict)
    lines: dict[Node, Any] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    made: frozenset[str] = frozenset()
    entered: frozenset[str] = frozenset()
    kept: dict[Node, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    augmented: frozenset[Node] = frozenset()


@dataclass
class Traced:
    """The result of tracing a model.

    Attributes:
        regions: the traced forwards, the model's own first if it could be traced.
        opaque: the modules that could not be traced, by name.
        error: why some values have no shape although inputs were given.
        altered: the modules that a forward alters, by name, each with the reason.
        ran: the functions that the traces ran.
    """

    regions: tuple[Region, ...]
    opaque: dict[str, Opaque]
    error: str | None
    altered: dict[str, str]
    ran: FunctionsRun


def trace_regions(model: Tree, inputs: Inputs | None = None, *, other_mode: bool = False) -> Traced:
    """Trace every forward that can be traced, each once; the model itself is only read.

    Args:
        model: the model under its qualified names.
        inputs: example inputs, for shapes; they are propagated on the meta device.
        other_mode: trace the model in the mode (train or eval) that it is not in.
    """
    tree = Tree(stand_in(model, without_values, lazy_copy))
    if other_mode:
        tree.model.train(not tree.model.training)
    layers = Layers(tree)
    shapes = None if inputs is None or is_lazy_model(model) else Shapes(model, tree, inputs)
    opaque: dict[str, Opaque] = {}
    regions: list[Region] = []
    seen: set[str] = set()
    expanded: set[str] = set()
    ran = FunctionsRun(tree)
    tracer = RegionTracer(tree, tensor_names(tree), opaque, shapes, ran)

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
                if shapes is not None and not name:
                    shapes.observe(name)
                expanded.add(name)
                pending.extend(reversed(_children(module)))
                continue
            regions.append(region)
            called = {str(n.target) for n in region.graph.nodes if n.op == "call_module"}
            seen.update(called, region.entered)
            for inner in reversed([n for n in called if n in opaque and n not in expanded]):
                expanded.add(inner)
                module = tree.get(inner)
                boundary = _is_boundary(opaque[inner])
                pending.extend([module] if boundary else reversed(_children(module)))

    with tracing(tree.model):
        visit(tree.model)
        # What no trace reached: another branch, a training head, the inside of a torch.nn block.
        for name, module in tree.modules():
            parametrization = ".parametrizations." in f".{name}."
            if name not in seen and not parametrization and not _is_iterated(tree, module, seen):
                visit(module)
    error = None if shapes is None else shapes.error
    return Traced(tuple(regions), opaque, error, layers.altered(tracer.moved), ran)


def is_lazy_model(tree: Tree) -> bool:
    """Return whether a layer takes its shape from the first input that it sees."""
    return any(
        tensor is not None and is_lazy(tensor)
        for _, module in tree.modules()
        for held in (module._parameters, module._buffers)
        for tensor in held.values()
    )


def _is_boundary(item: Opaque | None) -> bool:
    """Return whether a module is opaque only because hooks watch it: its forward can be traced."""
    return item is not None and item.source is None and item.reason.endswith("hook")


def _is_iterated(tree: Tree, module: nn.Module, seen: set[str]) -> bool:
    """Return whether a Sequential is used as a list: its items are called, but not itself.

    So is an empty one that is never called.
    """
    if inspect.getattr_static(type(module), "forward") is not nn.Sequential.forward:
        return False
    children = [tree.name(child) for _, child in slots(module)]
    return not children or any(name in seen for name in children)


def _children(module: nn.Module) -> list[nn.Module]:
    """Return the submodules of a module in order of registration, lists replaced by their items."""
    found: list[nn.Module] = []
    for _, child in slots(module):
        if not _has_forward(child) or isinstance(child, nn.ModuleList):
            found.extend(_children(child))
        else:
            found.append(child)
    return found


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
        return _leaf_region(module, name, tracer.shapes)
    if "forward" in vars(module):
        opaque[name] = Opaque(name, "has a forward that was set on the instance", None)
        return None
    assumed = forward_defaults(module)
    if tracer.shapes is not None and not name:
        assumed = tracer.shapes.given(module, assumed)
    try:
        trace = tracer.run(module, assumed)
    except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
        opaque[name] = Opaque(name, *reason_of(error))
        return None
    return _region(name, trace, assumed, forward_branches(module, assumed))


def _region(name: str, trace: Trace, assumed: dict[str, Any], branches: tuple[str, ...]) -> Region:
    alive = set(trace.graph.nodes)
    frames = {node: frame for node, frame in trace.frames.items() if node in alive}
    return Region(
        name, trace.graph, assumed, branches, frames, trace.lines, trace.constants, trace.made,
        frozenset(trace.entered), trace.kept, real_decisions(trace.decisions, trace.lines),
        frozenset(trace.augmented & alive),
    )  # fmt: skip


def _leaf_region(module: nn.Module, name: str, shapes: Shapes | None) -> Region:
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
    if shapes is not None:
        shapes.enter(name, module)
        for node in (*inputs, call):
            shapes.attach(node, {}, opaque=False)
    return Region(name, graph, frames=frames)


def forward_defaults(module: nn.Module) -> dict[str, Any]:
    """Return the defaults of a forward's optional parameters, which a trace assumes.

    If all parameters are optional, the first still is an input: `forward(pixel_values=None)`
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
    """Return the assumed parameters that the forward's own code branches on."""
    if not assumed or str(type(module).forward.__module__).startswith("torch.nn."):
        return ()  # torch's own layers choose between ways to compute one function
    if isinstance(graph := getattr(type(module), "graph", None), Graph):
        return _checked(graph, assumed)
    tree = source_of(inspect.unwrap(type(module).forward))
    if tree is None:
        return tuple(assumed)
    tested: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            tested |= {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.BoolOp):
            tested |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return tuple(name for name in assumed if name in tested)


def _checked(graph: Graph, assumed: Iterable[str]) -> tuple[str, ...]:
    """Return the parameters that a generated forward asserts to have the assumed value."""
    read = {n.target: n.users for n in graph.nodes if n.op == "placeholder"}
    return tuple(
        key
        for key in assumed
        if any(
            test.target is torch._assert and user.target is not operator.is_not
            for user in read.get(key, ())
            for test in user.users
        )
    )
