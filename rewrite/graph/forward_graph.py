"""One module's forward as a graph of its own, and that graph as a module again.

The innermost owner of a line is traced with its children as single calls. After the edit it becomes
an `nn.Sequential` of its own children where that says the same, and a GraphModule of that one
module otherwise.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase

from rewrite.graph.captured import Captured
from rewrite.graph.effects import has_effect
from rewrite.runtime.copying import lazy_copy
from rewrite.runtime.stand_in import stand_in, without_values
from rewrite.runtime.tree import Tree, tensor_names
from rewrite.tracing.patches import tracing
from rewrite.tracing.regions import forward_branches, forward_defaults
from rewrite.tracing.source_lines import reason_of
from rewrite.tracing.tracer import RegionTracer

_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")


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
    """

    owner: str
    graph: Graph
    lines: dict[Any, list[Node]]
    children: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, nn.Parameter] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    edited: bool = False


def open_forward(captured: Captured, owner: str, module: nn.Module) -> Forward | str:
    """Return the forward of `module` open for editing, or why it cannot be; change nothing."""
    if isinstance(module, GraphModule):
        return Forward(owner, module.graph, _lines(module.graph, owner))
    for reason in captured.hooks(owner):
        return f"is a line of the forward of {owner}, which {reason}"
    if not isinstance(module, _NormBase) and _tests_training(module):
        return f"is a line of the forward of {owner}, which branches on self.training"
    tree = Tree(stand_in(Tree(module), without_values, lazy_copy))
    defaults = forward_defaults(module)
    fixed = {key: defaults[key] for key in forward_branches(module, defaults)}
    tracer = RegionTracer(tree, tensor_names(tree), {})
    tracer.shallow = True
    try:
        with tracing():
            trace = tracer.run(tree.model, fixed)
    except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
        return f"is a line of {owner}'s forward, which cannot be traced: {reason_of(error)[0]}"
    forward = Forward(owner, trace.graph, _lines(trace.graph, owner))
    forward.constants.update(trace.constants)
    forward.children.update(_keep_dropout_modes(trace.graph, module))
    if isinstance(module, _NormBase):
        _drop_norm_bookkeeping(forward.graph)
    return forward


def line_key(node: Node, owner: str) -> Any:
    """Return what identifies a call among those of one forward; module targets made relative."""
    if node.op == "call_module":
        target = str(node.target)
        return ("call_module", target.removeprefix(f"{owner}.") if owner else target)
    return (node.op, node.target)


def _lines(graph: Graph, owner: str) -> dict[Any, list[Node]]:
    lines: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            lines.setdefault(("call_module", str(node.target)), []).append(node)
        else:
            lines.setdefault((node.op, node.target), []).append(node)
    return lines


def _tests_training(module: nn.Module) -> bool:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
    except (OSError, TypeError):
        return False
    return any(
        isinstance(inner, ast.Attribute) and inner.attr == "training"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If | ast.IfExp)
        for inner in ast.walk(node.test)
    )


def _keep_dropout_modes(graph: Graph, owner: nn.Module) -> dict[str, nn.Module]:
    """Let functional dropout follow the mode of the module again, which the trace made constant."""
    layers: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in _DROPOUTS:
            continue
        names = ("input", "p", "training", "inplace")
        call = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if call.get("training") is not owner.training:
            continue
        kind = {"dropout": nn.Dropout, "alpha_dropout": nn.AlphaDropout}.get(name)
        layer = (kind or getattr(nn, f"Dropout{name[-2:]}"))(call.get("p", 0.5))
        layer.train(owner.training)
        key = f"{name}_{len(owner._modules) + len(layers)}"
        layers[key] = layer
        with graph.inserting_before(node):
            new = graph.create_node("call_module", key, (call["input"],))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return layers


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
    """Return the owner as nn.Sequential if its graph is a chain of calls of its own children."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    if not nodes or nodes[0].op != "placeholder":
        return None
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for previous, node in pairwise(nodes):
        name = str(node.target)
        if node.op != "call_module" or node.args != (previous,) or node.kwargs:
            return None
        if "." in name or name in children or len(previous.users) != 1:
            return None
        children[name] = owner._modules[name]  # type: ignore[assignment]
    output = next(node for node in graph.nodes if node.op == "output")
    if output.args != (nodes[-1],) or set(owner._modules) - set(children):
        return None
    if any(p is not None for p in owner._parameters.values()) or owner._buffers:
        return None
    return nn.Sequential(children)


def as_graph_module(graph: Graph, owner: nn.Module) -> GraphModule:
    """Return the owner as a GraphModule that keeps its children, tensors and plain attributes."""
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
