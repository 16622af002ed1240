"""The only code that edits a model: its tensors, its modules, and calls in a module's forward.

A layer that is a module is replaced in the tree, under every name. A line of code (`F.batch_norm`
in somebody's forward) can only change together with the forward that holds it: the innermost owner
alone is traced, with its children as single calls, its graph is edited, and at `commit` the owner
becomes an `nn.Sequential` of its own children where that is all it is, and otherwise gets a class
that extends the one it had by the new forward. A GraphModule is edited in its own graph.

No tensor is written in place: its storage may be shared with the model that the user keeps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from rewrite.errors import PassError
from rewrite.graph.captured import Captured
from rewrite.graph.forward_graph import Forward, finish_forward
from rewrite.graph.refs import TensorRef
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.runtime.tree import Tree, join
from rewrite.tracing.code.settings import settings_of


class Editor(TensorWriter):
    """Edits one captured model in place. Take it from `captured.editor`.

    What a module holds is written by the methods of `TensorWriter`.

    Attributes:
        rewritten: the forwards that `commit` has finished, by their owner, each with the qualified
            names of the parameters and buffers that came or went with it.
        settings: the owners, by class and by what plain values that code read from attributes.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.rewritten: dict[str, tuple[str, ...]] = {}
        self.settings: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self._lines = captured.lines
        self._removed: list[nn.Module] = []

    # -- tensors and modules ------------------------------------------------------------------

    def set_tensor(self, ref: TensorRef, tensor: torch.Tensor) -> None:
        """Put `tensor` (detached, any dtype) where `ref` points, as a parameter or buffer.

        A parameter keeps its `requires_grad`; a new one takes that of the owner's weight.
        """
        self.write(self.captured.module(ref.owner), ref.attr, tensor)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in place of the one called `name`, in every place that holds it."""
        old = self.captured.module(name)
        module.train(old.training)
        self._exchange(old, module)

    def _exchange(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in every place of `old`, the root of the model included."""
        self.captured.tree.replace(old, new)
        self.captured.model = self.captured.tree.model

    # -- lines --------------------------------------------------------------------------------

    def bypass(self, node: Node, operand: Node | None = None) -> None:
        """Make the value of `node` that of `operand`, its first input: a layer becomes Identity."""
        if node.op == "call_module" and not self._lines.in_graph_module(node):
            self.replace(str(node.target), nn.Identity())
            return
        forward, line = self._lines.open_line(node)
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
        forward, line = self._lines.open_line(node)
        owner = self.captured.module(forward.owner)
        key = self._place_of(holder, forward, line) or _free_name(owner, forward.children, name)
        _call_instead(forward, line, key, module.train(owner.training), line.all_input_nodes[0])
        forward.graph.erase_node(line)
        return join(forward.owner, key)

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

        Raises:
            PassError: there is no one value that the branches begin at.
        """
        forward, line = self._lines.open_line(node)
        before = source(line)
        if before is None:
            raise PassError(f"{forward.owner}: the branches of {node.name} begin at several values")
        owner = self.captured.module(forward.owner)
        key = _free_name(owner, forward.children, name)
        _call_instead(forward, line, key, module.train(owner.training), before)
        dead = [line]
        while dead:
            gone = dead.pop()
            if not gone.users and gone is not before and gone.op != "placeholder":
                inputs = gone.all_input_nodes
                forward.graph.erase_node(gone)
                dead.extend(inputs)
        return join(forward.owner, key)

    def recompute(
        self, node: Node, make: Callable[[Graph, Node], Node], also: Sequence[Node] = ()
    ) -> None:
        """Put another call where the line of `node` stands.

        Args:
            node: the call.
            make: given the owner's own graph, open before the line, and the line: the new node.
            also: nodes of the owner's graph before the line, which later lines no longer read:
                they read the new value.
        """
        forward, line = self._lines.open_line(node)
        places = {other: index for index, other in enumerate(forward.graph.nodes)}
        later = [(old, u) for old in also for u in old.users if places[u] > places[line]]
        with forward.graph.inserting_before(line):
            new = make(forward.graph, line)
        line.replace_all_uses_with(new)
        for old, user in later:
            user.replace_input_with(old, new)
        forward.graph.erase_node(line)

    def remove(self, name: str) -> None:
        """Take a module that nothing calls any more out of its parents at `commit`."""
        self._removed.append(self.captured.module(name))

    def set_argument(self, node: Node, index: int, name: str, tensor: torch.Tensor) -> TensorRef:
        """Give a function call a new tensor argument, or add it to the one that lines compute."""
        forward, line = self._lines.open_line(node)
        owner = self.captured.module(forward.owner)
        reads = [n for n in line.all_input_nodes if n.op == "get_attr"]
        place = str(reads[0].target).rpartition(".")[0] if reads else ""
        beside = owner.get_submodule(place)
        prefix = f"{place}." if place else ""
        taken = {key.removeprefix(prefix) for key in forward.tensors}
        key = prefix + _free_name(beside, taken, name)
        trained = [t.requires_grad for t in beside._parameters.values() if t is not None]
        forward.tensors[key] = nn.Parameter(tensor.detach(), any(trained) or not trained)
        with forward.graph.inserting_before(line):
            read = forward.graph.create_node("get_attr", key)
            given = line.kwargs.get(name, line.args[index] if len(line.args) > index else None)
            if isinstance(given, Node):
                read = forward.graph.call_function(operator.add, (given, read))
        arguments = list(line.args)
        if name in line.kwargs or len(arguments) < index:
            line.update_kwarg(name, read)
        else:
            arguments[index : index + 1] = [read]
            line.args = tuple(arguments)
        return TensorRef.of(join(forward.owner, key))

    def commit(self) -> None:
        """Finish every edited forward: a chain becomes nn.Sequential, the rest a GraphModule."""
        for module in self._removed:
            _remove(self.captured.tree, module)
        self._removed.clear()
        opened = self._lines.take_edited()
        # Inner owners first: an outer one takes its children over as they are by then.
        for forward in sorted(opened, key=lambda f: -len(f.owner.split(".")) * bool(f.owner)):
            owner = self.captured.module(forward.owner)
            before = _tensors(owner)
            if held := settings_of(owner):
                self.settings.setdefault((type(owner).__name__, held), []).append(forward.owner)
            if (new := finish_forward(forward, owner)) is not owner:
                self._exchange(owner, new)
            after = _tensors(self.captured.module(forward.owner))
            changed = [k for k in (before | after) if before.get(k) is not after.get(k)]
            self.rewritten[forward.owner] = tuple(join(forward.owner, key) for key in changed)

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


def _call_instead(forward: Forward, line: Node, key: str, module: nn.Module, operand: Node) -> None:
    """Let what reads a line read a call of `module`, the new child `key`, on `operand` instead."""
    forward.children[key] = module
    with forward.graph.inserting_before(line):
        call = forward.graph.create_node("call_module", key, (operand,))
    line.replace_all_uses_with(call)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module and of all below it, under all names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


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
