"""Turn one module's forward into an fx graph, and an edited graph back into a module.

The innermost owner of a line is traced with its children as single calls. After the edit it becomes
an `nn.Sequential` of its own children where that says the same, and a GraphModule of that one
module otherwise.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _NormBase

from rewrite.graph.effects import has_effect, recorded, write_in_place
from rewrite.nn.edited import EditedForward, with_forward
from rewrite.runtime.copying import lazy_copy
from rewrite.runtime.stand_in import stand_in, without_values
from rewrite.runtime.tree import Tree, tensor_names
from rewrite.tracing.decisions import place_of
from rewrite.tracing.patches import contexts_entered, tracing
from rewrite.tracing.records import Trace
from rewrite.tracing.regions import forward_branches, forward_defaults
from rewrite.tracing.source_lines import reason_of, short
from rewrite.tracing.tracer import RegionTracer

if TYPE_CHECKING:
    from rewrite.graph.captured import Captured


@dataclass
class Forward:
    """The forward of one module, open for editing.

    Attributes:
        owner: qualified name of the module.
        graph: its own graph, targets relative to the owner.
        lines: the calls as they stood before any edit, by target, in order.
        children: submodules that `commit` adds to the owner.
        tensors: parameters that `commit` adds to the owner.
        constants: tensors that the forward makes from nothing, kept as buffers.
        fixed: arguments that its code tests, taken at their defaults.
    """

    owner: str
    graph: Graph
    lines: dict[Any, list[Node]]
    children: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, nn.Parameter] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    edited: bool = False


_FUNCTIONAL = "torch._C._nn"
"""Where functions of torch.nn.functional say that they are at home: linear, pad, gelu."""


def open_forward(
    captured: Captured, owner: str, module: nn.Module, given: str | None = None
) -> Forward | str:
    """Return the forward of `module` open for editing, or why it cannot be; change nothing.

    Arguments that its code tests are taken at their defaults, but for `given`, which is there.
    """
    if isinstance(module, GraphModule):
        return Forward(owner, module.graph, _lines(module.graph))
    where = owner or "the model"
    for reason in captured.hooks(owner):
        return f"is a line of the forward of {where}, which {reason}"
    is_norm = isinstance(module, _NormBase)
    if not is_norm and (lost := captured.code.uneditable(owner)) is not None:
        return f"is a line of the forward of {where}, which {lost}"
    defaults = forward_defaults(module)
    tested = forward_branches(module, defaults)
    fixed = {key: defaults[key] for key in tested if key != given}
    copied = Tree(stand_in(Tree(module), without_values, lazy_copy))
    trace = _trace(module, copied, fixed, module.training)
    if isinstance(trace, str):
        return f"is a line of the forward of {where}, which {trace}"
    if is_norm:
        _drop_norm_bookkeeping(trace.graph)
    elif (apart := _follow_mode(trace, module, copied, fixed)) is not None:
        return f"is a line of the forward of {where}, which {apart}"
    if given is not None:
        _require(trace.graph, given)
    write_in_place(captured, owner, trace.graph, trace.augmented)
    forward = Forward(owner, trace.graph, _lines(trace.graph), fixed=tuple(tested))
    forward.constants.update(trace.constants)
    return forward


def _trace(module: nn.Module, tree: Tree, fixed: dict[str, Any], training: bool) -> Trace | str:
    """Return the forward of `module` in one mode, its children as calls, or why it cannot be.

    `tree`: the stand-in of the module that is traced.
    """
    for inner in tree.model.modules():
        inner.training = training
    tracer = RegionTracer(tree, tensor_names(tree), {})
    tracer.shallow = True
    try:
        with tracing(tree.model), contexts_entered() as contexts:
            trace = tracer.run(tree.model, fixed)
    except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
        reason, source = reason_of(error)
        return f"cannot be traced: {reason}{short(source)}"
    if contexts and not isinstance(module, _NormBase):
        return f"enters {contexts[0]}"
    for node in trace.graph.nodes:
        home = str(getattr(node.target, "__module__", ""))
        if node.op == "call_function" and home.startswith("torch._C._") and home != _FUNCTIONAL:
            return f"calls {home}.{node.target.__name__}, which a file cannot name"
    if trace.decisions:
        return f"does something else {trace.decisions[0].when} ({place_of(trace.decisions[0])})"
    if trace.made:
        return "makes a tensor of its own at each call"
    if (lost := _unreachable(trace.graph, module)) is not None:
        return lost
    if tracer.altered:
        return "changes what it holds at each call"
    _name_arguments(trace.graph, fixed)
    return trace


def _name_arguments(graph: Graph, fixed: Iterable[str]) -> None:
    """Call the arguments that a trace has fixed as the forward does, and check each when it runs.

    torch.fx numbers them, and checks for None by a function that no file names.
    """
    named = {f"{key}_1": key for key in fixed}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target in named:
            node.target = named[node.target]
        elif node.target is _assert_is_none:
            with graph.inserting_before(node):
                is_none = graph.call_function(operator.is_, (node.args[0], None))
                graph.call_function(torch._assert, (is_none, node.args[1]))
            graph.erase_node(node)


def _require(graph: Graph, name: str) -> None:
    """Raise where an argument that the lines read is None."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    argument = next(node for node in graph.nodes if node.target == name)
    with graph.inserting_after(last):
        there = graph.call_function(operator.is_not, (argument, None))
    with graph.inserting_after(there):
        graph.call_function(torch._assert, (there, f"{name} was given where this was traced"))


def _unreachable(graph: Graph, module: nn.Module) -> str | None:
    """Return what a graph reads that no attribute holds: an item of a list, a generator; or None.

    A generated forward could not name it. Tensors without a place get one.
    """
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr") or str(node.target).startswith("_constant"):
            continue
        value: Any = module
        for step in str(node.target).split("."):
            value = getattr(value, step, None)
        if str(node.target).startswith("_opaque_obj"):
            return "makes an object of its own at each call"
        if value is None:
            return f"reads {node.target}, which is no attribute of its own"
    return None


def _follow_mode(trace: Trace, module: nn.Module, tree: Tree, fixed: dict[str, Any]) -> str | None:
    """Let each line that is told the mode read it again; return why that cannot be, or None.

    The other mode has to differ in nothing but arguments that are True in training mode and False
    in eval mode. Both are traced on one stand-in: what a forward counts shows as well.
    """
    other = _trace(module, tree, fixed, not module.training)
    if isinstance(other, str):
        return f"in its other mode {other}"
    told = _told(trace.graph, other.graph, module.training)
    if told is None:
        again = _trace(module, tree, fixed, module.training)
        alike = not isinstance(again, str) and _told(trace.graph, again.graph, None) is not None
        return _OTHER_MODE if alike else "computes something else at each call"
    for node, args, kwargs in told:
        with trace.graph.inserting_before(node):
            mode = trace.graph.create_node("get_attr", "training")
        node.args = tuple(mode if value is _MODE else value for value in args)
        node.kwargs = {k: mode if value is _MODE else value for k, value in kwargs.items()}
    return None


def _told(
    graph: Graph, other: Graph, mode: bool | None
) -> list[tuple[Node, list[Any], dict[str, Any]]] | None:
    """Return the lines of `graph` that are told its mode, if nothing else differs in the other.

    With None for the mode both are traces of one mode.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    if len(nodes) != len(others):
        return None
    same = dict(zip(others, nodes, strict=True))
    told: list[tuple[Node, list[Any], dict[str, Any]]] = []
    for node, twin in zip(nodes, others, strict=True):
        if (
            node.op != twin.op
            or node.target != twin.target
            or node.kwargs.keys() != twin.kwargs.keys()
        ):
            return None
        mine, theirs = [*node.args, *node.kwargs.values()], [*twin.args, *twin.kwargs.values()]
        if len(mine) != len(theirs):
            return None
        values = []
        for value, changed in zip(mine, theirs, strict=True):
            mapped = map_arg(changed, same.__getitem__)
            if mode is not None and value is mode and mapped is (not mode):
                values.append(_MODE)
            elif _differ(value, mapped):
                return None
            else:
                values.append(value)
        if any(value is _MODE for value in values):
            keywords = dict(zip(node.kwargs, values[len(node.args) :], strict=True))
            told.append((node, values[: len(node.args)], keywords))
    return told


_OTHER_MODE = "branches on self.training, or a function that it calls does"

_MODE = object()
"""Stands for an argument that is the mode of the module."""


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is not other
    return bool(type(one) is not type(other) or one != other)


def line_key(node: Node, owner: str) -> Any:
    """Return what identifies a call among those of one forward; module targets made relative."""
    if node.op == "call_module":
        target = str(node.target)
        return ("call_module", target.removeprefix(f"{owner}.") if owner else target)
    return (node.op, recorded(node.target))


def _lines(graph: Graph) -> dict[Any, list[Node]]:
    lines: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        lines.setdefault(line_key(node, ""), []).append(node)
    return lines


def _drop_norm_bookkeeping(graph: Graph) -> None:
    """Erase a norm's counter of batches and its checks of the input's dimensions."""
    for node in reversed(list(graph.nodes)):
        counts = node.op == "call_method" and node.target == "add_" and not node.users
        checks = node.op == "call_function" and node.target is torch._assert
        if counts or checks:
            graph.erase_node(node)


def drop_dead_code(graph: Graph, owner: nn.Module) -> None:
    """Erase reads that nothing uses any more, and the tensors that only they read."""
    before = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    for node in reversed(list(graph.nodes)):
        pure = node.op == "get_attr" or _is_size(node)
        pure = pure or (node.op in ("call_function", "call_method") and not has_effect(node))
        if pure and not node.users:
            graph.erase_node(node)
    after = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    for name in before - after:
        if "." not in name:
            owner._parameters.pop(name, None)
            owner._buffers.pop(name, None)
    if isinstance(owner, _NormBase):
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if name not in after:
                owner._parameters.pop(name, None)
                owner._buffers.pop(name, None)


def _is_size(node: Node) -> bool:
    return node.op == "call_method" and node.target in ("size", "dim")


def as_sequential(graph: Graph, owner: nn.Module) -> nn.Sequential | None:
    """Return the owner as nn.Sequential if that is all it is: a chain of its own children.

    Its class has to have no more than a constructor and a forward, and the module no attributes.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    if not nodes or nodes[0].op != "placeholder" or not _is_plain(owner):
        return None
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for previous, node in pairwise(nodes):
        name = str(node.target)
        if node.op != "call_module" or node.args != (previous,) or node.kwargs:
            return None
        if "." in name or name in children or len(previous.users) != 1:
            return None
        children[name] = owner._modules[name]  # type: ignore[assignment]  # a child that is called is a module
    output = next(node for node in graph.nodes if node.op == "output")
    if output.args != (nodes[-1],) or set(owner._modules) - set(children):
        return None
    if any(p is not None for p in owner._parameters.values()) or owner._buffers:
        return None
    return nn.Sequential(children)


_NO_MORE = frozenset({"__module__", "__qualname__", "__doc__", "__init__", "forward", "__dict__"})


def _is_plain(owner: nn.Module) -> bool:
    """Return whether nothing but a constructor and a forward makes the class of `owner`."""
    if isinstance(owner, _NormBase):
        return True
    kinds = [k for k in type(owner).__mro__ if not k.__module__.startswith(("torch", "builtins"))]
    named = {name for kind in kinds for name in vars(kind)}
    extra = {key for key in vars(owner) if key not in _MODULE_ATTRIBUTES}
    public = {name for name in named - _NO_MORE if not name.startswith("__")}
    return not public and not extra and not issubclass(type(owner), EditedForward)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def as_graph_module(graph: Graph, owner: nn.Module) -> GraphModule:
    """Return a norm whose normalization went as a GraphModule: its class would say it still is one.

    Its children, tensors and plain attributes stay.
    """
    graph.lint()
    new = GraphModule(owner, graph, class_name=type(owner).__name__)
    for key, child in owner._modules.items():
        if key not in new._modules:
            new.add_module(key, child)
    for key, parameter in owner._parameters.items():
        if key not in new._parameters:
            new.register_parameter(key, parameter)
    for key, buffer in owner._buffers.items():
        persistent = key not in owner._non_persistent_buffers_set
        new.register_buffer(key, buffer, persistent=persistent)
    for key, value in vars(owner).items():
        plain = isinstance(value, bool | int | float | str | tuple | type(None))
        if plain and not key.startswith("_") and key not in vars(new):
            setattr(new, key, value)
    return new


def finish_forward(forward: Forward, owner: nn.Module) -> nn.Module:
    """Give `owner` the forward as it was edited; return it, or what has to take its place."""
    for key, tensor in forward.tensors.items():
        place, _, attr = key.rpartition(".")
        owner.get_submodule(place).register_parameter(attr, tensor)
    for key, constant in forward.constants.items():
        owner.register_buffer(key, constant, persistent=False)
    if isinstance(owner, GraphModule):
        for key, module in forward.children.items():
            owner.add_submodule(key, module)
        drop_dead_code(forward.graph, owner)
        owner.graph.lint()
        owner.recompile()
        owner.delete_all_unused_submodules()
        return owner
    for key, module in forward.children.items():
        owner.add_module(key, module)
    drop_dead_code(forward.graph, owner)
    new: nn.Module | None = as_sequential(forward.graph, owner)
    if new is None and not isinstance(owner, _NormBase):
        owner.__class__ = with_forward(type(owner), forward.graph)
        return owner
    new = new or as_graph_module(forward.graph, owner)
    new.training = owner.training
    return new
