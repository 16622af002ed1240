"""The only code that changes a model: tensors, modules, and lines of one module's forward.

A layer that is a module is replaced in the tree, under every name. A line of code (`F.batch_norm`
in somebody's forward) can only change together with the forward that holds it: the innermost owner
alone is traced, with its children as single calls, its graph is edited, and at `commit` the owner
becomes an `nn.Sequential` of its own children where that says the same, and a GraphModule of that
one module otherwise. A GraphModule is edited in its own graph.

No tensor is written in place: its storage may be shared with the model that the user keeps.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase

from rewrite.capture import Captured, TensorRef
from rewrite.errors import PassError
from rewrite.regions import forward_branches, forward_defaults
from rewrite.tracer import RegionTracer, reason_of, tracing
from rewrite.tree import Tree, join, tensor_names

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


class Editor:
    """Edits one captured model in place. Take it from `captured.editor`."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._forwards: dict[str, Forward | str] = {}
        self._removed: list[nn.Module] = []

    # -- tensors and modules ------------------------------------------------------------------

    def set_tensor(self, ref: TensorRef, tensor: torch.Tensor) -> None:
        """Put `tensor` (detached, any dtype) where `ref` points, as a parameter or buffer.

        A parameter keeps its `requires_grad`; a new one takes that of the owner's weight.
        """
        module = self.captured.module(ref.owner)
        if ref.attr in module._buffers:
            module._buffers[ref.attr] = tensor.detach()
            return
        old = module._parameters.get(ref.attr)
        if old is None:
            old = next((p for p in module._parameters.values() if p is not None), None)
        requires_grad = old.requires_grad if old is not None else tensor.is_floating_point()
        module.register_parameter(ref.attr, nn.Parameter(tensor.detach(), requires_grad))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in place of the one called `name`, in every place that holds it."""
        old = self.captured.module(name)
        module.train(old.training)
        self.captured.replace(old, module)

    # -- lines --------------------------------------------------------------------------------

    def refusal(self, node: Node, line: bool = False) -> str | None:
        """Return why the line that made `node` cannot be edited, or None. Changes nothing.

        A layer can be replaced whatever its line says; `line` asks for the line all the same.
        """
        owner = self.captured.owner(node)
        if node.op == "call_module" and not line and not self._in_graph_module(node):
            return None
        forward = self._open(owner)
        if isinstance(forward, str):
            return forward
        return None if self._line(forward, node) is not None else _elsewhere(owner)

    def bypass(self, node: Node, operand: Node | None = None) -> None:
        """Make the value of `node` that of `operand`, its first input: a layer becomes Identity."""
        if node.op == "call_module" and not self._in_graph_module(node):
            self.replace(str(node.target), nn.Identity())
            return
        forward, line = self._open_line(node)
        place = 0 if operand is None else node.all_input_nodes.index(operand)
        source = line.all_input_nodes[place]
        line.replace_all_uses_with(source)
        forward.graph.erase_node(line)

    def substitute(
        self, node: Node, module: nn.Module, name: str, holder: str | None = None
    ) -> str:
        """Make a call of a function a call of `module`, a new child of the owner.

        Args:
            node: the call.
            module: what is called instead.
            name: its name; a number is added if it is taken.
            holder: the module below the owner that holds the call's tensors, if any: `module` takes
                its place, and the names in a state dict stay, where nothing else needs it.

        Returns:
            The qualified name of the new child: `name`, with a number behind it if taken.
        """
        if node.op == "call_module":
            self.replace(str(node.target), module)
            return str(node.target)
        forward, line = self._open_line(node)
        owner = self.captured.module(forward.owner)
        key = self._place_of(holder, forward, line) or _free_name(owner, forward.children, name)
        module.train(owner.training)
        forward.children[key] = module
        with forward.graph.inserting_before(line):
            call = forward.graph.create_node("call_module", key, (line.all_input_nodes[0],))
        line.replace_all_uses_with(call)
        forward.graph.erase_node(line)
        return f"{forward.owner}.{key}" if forward.owner else key

    def merge(
        self, node: Node, source: Callable[[Node], Node | None], module: nn.Module, name: str
    ) -> str:
        """Make the value of `node` a call of `module` on an earlier value of the same forward.

        The lines between the two, which nothing else reads, go.

        Args:
            node: the call whose value is replaced.
            source: given the line of `node`, returns the line whose value `module` is called on.
            module: the new child of the owner.
            name: its name; a number is added if it is taken.

        Returns:
            The qualified name of the new child.
        """
        forward, line = self._open_line(node)
        before = source(line)
        if before is None:
            raise PassError(f"{forward.owner}: the branches of {node.name} begin at several values")
        owner = self.captured.module(forward.owner)
        key = _free_name(owner, forward.children, name)
        module.train(owner.training)
        forward.children[key] = module
        with forward.graph.inserting_before(line):
            call = forward.graph.create_node("call_module", key, (before,))
        line.replace_all_uses_with(call)
        dead = [line]
        while dead:
            gone = dead.pop()
            if not gone.users and gone is not before and gone.op != "placeholder":
                inputs = gone.all_input_nodes
                forward.graph.erase_node(gone)
                dead.extend(inputs)
        return f"{forward.owner}.{key}" if forward.owner else key

    def remove(self, name: str) -> None:
        """Take a module that nothing calls any more out of its parents at `commit`."""
        self._removed.append(self.captured.module(name))

    def set_argument(self, node: Node, index: int, name: str, tensor: torch.Tensor) -> TensorRef:
        """Give a function call a new tensor argument (a bias, say), stored beside its others."""
        forward, line = self._open_line(node)
        owner = self.captured.module(forward.owner)
        reads = [n for n in line.all_input_nodes if n.op == "get_attr"]
        place = str(reads[0].target).rpartition(".")[0] if reads else ""
        beside = owner.get_submodule(place)
        prefix = f"{place}." if place else ""
        taken = {key.removeprefix(prefix) for key in forward.tensors}
        key = prefix + _free_name(beside, taken, name)
        forward.tensors[key] = nn.Parameter(tensor.detach())
        with forward.graph.inserting_before(line):
            read = forward.graph.create_node("get_attr", key)
        arguments = list(line.args)
        if name in line.kwargs or len(arguments) < index:
            line.update_kwarg(name, read)
        else:
            arguments[index : index + 1] = [read]
            line.args = tuple(arguments)
        holder, _, attr = join(forward.owner, key).rpartition(".")
        return TensorRef(holder, attr)

    # -- commit -------------------------------------------------------------------------------

    def commit(self) -> None:
        """Finish every edited forward: a chain becomes nn.Sequential, the rest a GraphModule."""
        for module in self._removed:
            _remove(self.captured.tree, module)
        self._removed.clear()
        opened = [f for f in self._forwards.values() if isinstance(f, Forward) and f.edited]
        # Inner owners first: an outer one takes its children over as they are by then.
        for forward in sorted(opened, key=lambda f: -len(f.owner.split(".")) * bool(f.owner)):
            self._finish(forward)
        self._forwards.clear()

    def _finish(self, forward: Forward) -> None:
        owner = self.captured.module(forward.owner)
        for key, tensor in forward.tensors.items():
            place, _, attr = key.rpartition(".")
            owner.get_submodule(place).register_parameter(attr, tensor)
        for key, constant in forward.constants.items():
            owner.register_buffer(key, constant, persistent=False)
        if isinstance(owner, GraphModule):
            for key, module in forward.children.items():
                owner.add_submodule(key, module)
            _drop_dead_code(forward.graph, owner)
            owner.graph.lint()
            owner.recompile()
            owner.delete_all_unused_submodules()
            return
        for key, module in forward.children.items():
            owner.add_module(key, module)
        _drop_dead_code(forward.graph, owner)
        new = _sequential(forward.graph, owner) or _graph_module(forward.graph, owner)
        new.training = owner.training
        self.captured.replace(owner, new)

    # -- opening ------------------------------------------------------------------------------

    def _place_of(self, holder: str | None, forward: Forward, line: Node) -> str | None:
        """Return the name of `holder` relative to the owner if only `line` needs that module."""
        if holder is None or holder == forward.owner:
            return None
        key = holder.removeprefix(f"{forward.owner}.") if forward.owner else holder
        module = self.captured.module(holder)
        called = self.captured.callers_known(holder) and self.captured.calls(holder)
        if module._modules or called:
            return None
        if "." in key and not isinstance(self.captured.module(forward.owner), GraphModule):
            return None
        reads = [n for n in forward.graph.nodes if str(n.target).startswith(f"{key}.")]
        return key if all(set(n.users) <= {line} for n in reads) else None

    def _in_graph_module(self, node: Node) -> bool:
        return isinstance(self.captured.module(self.captured.owner(node)), GraphModule)

    def _open_line(self, node: Node) -> tuple[Forward, Node]:
        owner = self.captured.owner(node)
        forward = self._open(owner)
        if isinstance(forward, str):
            raise PassError(f"{owner}: {forward}")
        line = self._line(forward, node)
        if line is None:
            raise PassError(f"{owner}: {_elsewhere(owner)}")
        forward.edited = True
        return forward, line

    def _line(self, forward: Forward, node: Node) -> Node | None:
        """Return the node of the owner's own graph that made `node`, by its order among equals."""
        region = self.captured.region_of(node)
        frame = region.frames[node]
        key = _line_key(node, frame.owner)
        equals = [
            other
            for other in region.graph.nodes
            if region.frames[other] == frame and _line_key(other, frame.owner) == key
        ]
        lines = forward.lines.get(key, [])
        return lines[equals.index(node)] if len(lines) == len(equals) else None

    def _open(self, owner: str) -> Forward | str:
        """Return the owner's forward open for editing, or why it cannot be."""
        if owner not in self._forwards:
            module = self.captured.module(owner)
            if isinstance(module, GraphModule):
                self._forwards[owner] = Forward(owner, module.graph, _lines(module.graph, owner))
            else:
                self._forwards[owner] = self._trace(owner, module)
        return self._forwards[owner]

    def _trace(self, owner: str, module: nn.Module) -> Forward | str:
        for reason in self.captured.hooks(owner):
            return f"is a line of the forward of {owner}, which {reason}"
        if not isinstance(module, _NormBase) and _tests_training(module):
            return f"is a line of the forward of {owner}, which branches on self.training"
        tree = Tree(module)
        defaults = forward_defaults(module)
        fixed = {key: defaults[key] for key in forward_branches(module, defaults)}
        tracer = RegionTracer(tree, tensor_names(tree), {})
        tracer.shallow = True
        try:
            with tracing(tree):
                trace = tracer.run(module, fixed)
        except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
            return f"is a line of {owner}'s forward, which cannot be traced: {reason_of(error)[0]}"
        forward = Forward(owner, trace.graph, _lines(trace.graph, owner))
        forward.constants.update(trace.constants)
        forward.children.update(_keep_dropout_modes(trace.graph, module))
        if isinstance(module, _NormBase):
            _drop_norm_bookkeeping(forward.graph)
        return forward


def _free_name(owner: nn.Module, taken: Collection[str], name: str) -> str:
    key, number = name, 1
    while hasattr(owner, key) or key in taken:
        number += 1
        key = f"{name}{number}"
    return key


def _remove(tree: Tree, module: nn.Module) -> None:
    """Take a module out of its parents, and containers that it leaves empty out of theirs."""
    for slot in tree.slots_of(module):
        parent = slot.parent
        if slot.path or slot.attr not in parent._modules:
            continue
        del parent._modules[slot.attr]
        if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential) and not len(parent):
            _remove(tree, parent)


def _elsewhere(owner: str) -> str:
    return f"is a line of the forward of {owner}, which runs differently at different calls"


def _line_key(node: Node, owner: str) -> Any:
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


def _drop_dead_code(graph: Graph, owner: nn.Module) -> None:
    """Erase reads that nothing uses any more, and the tensors that only they read."""
    before = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    for node in reversed(list(graph.nodes)):
        pure = node.op == "get_attr" or _is_size(node)
        pure = pure or (node.op == "call_function" and not node.is_impure())
        pure = pure or (node.op == "call_method" and not str(node.target).endswith("_"))
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


def _sequential(graph: Graph, owner: nn.Module) -> nn.Sequential | None:
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


def _graph_module(graph: Graph, owner: nn.Module) -> GraphModule:
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
