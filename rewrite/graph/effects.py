"""Side effects and aliasing: what calls write, which values share memory, who reads it later.

    n : v ← f(v)     in place, is      n = f(v)     if no alias of v is read after n,
                                        n = f(v)     with v replaced by n in the later readers of v

The second only where all of them read v itself: a view that was taken before the write would have
to be taken again. An operation that nothing is known of may return any of its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.spellings import function_name
from rewrite.graph.traits import Trait, has
from rewrite.tracing.proxies import AUGMENTED
from rewrite.tracing.regions import Region
from rewrite.tracing.tracer import is_leaf


class Model(Protocol):
    """What is asked of a captured model here."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """The traced forwards."""

    def module(self, name: str) -> nn.Module:
        """Return the module called `name`."""

    def region_of(self, node: Node) -> Region:
        """Return the traced forward that `node` belongs to."""


_OTHER_VIEWS = frozenset(
    {"diagonal", "ravel", "as_strided", "broadcast_to", "real", "imag", "atleast_1d", "atleast_2d",
     "atleast_3d", "clone_if_needed", "rearrange"}
)  # fmt: skip
"""What may return its input or a part of it, beside what the table of operations says."""

_MANY_VIEWS = frozenset({"broadcast_tensors", "tuple", "list"})

_SHARING_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.ConstantPad2d,
    nn.modules.dropout._DropoutNd,
)  # fmt: skip

_NUMBERS = frozenset({"size", "dim", "numel", "len", "ndimension", "stride", "element_size"})


def shared_inputs(captured: Model, node: Node, prefix: str = "") -> tuple[Node, ...]:
    """Return the inputs of `node` whose memory its value may share.

    Args:
        captured: the model.
        node: a node of one of its graphs.
        prefix: the owner that the targets of the graph's modules are relative to.
    """
    inputs = tuple(node.all_input_nodes)
    if node.op == "call_module":
        name = f"{prefix}.{node.target}" if prefix else str(node.target)
        module = captured.module(name)
        if _is_in_place(module):
            return inputs[:1]
        return () if is_leaf(module) and not isinstance(module, _SHARING_MODULES) else inputs
    if node.op == "output":
        return ()
    name = function_name(node) or ""
    if name in _MANY_VIEWS:
        return inputs
    if has(node, Trait.VIEWS) or name in _OTHER_VIEWS:
        return inputs[:1]
    if writes := _written(node):
        return writes
    if node.op == "call_function" and not _is_torch(node.target):
        return inputs  # Somebody's function, called as one node: it may return what it gets.
    return ()


def _written(node: Node) -> tuple[Node, ...]:
    """Return the inputs that an operation spelled in place writes, and returns."""
    if node.op not in ("call_function", "call_method"):
        return ()
    spelled = str(node.target) if node.op == "call_method" else _name(node)
    plain = spelled.endswith("_") and not spelled.endswith("__")
    flagged = node.kwargs.get("inplace") or (spelled in _FLAGGED and True in node.args[1:])
    if plain or flagged or node.target in _IN_PLACE_OPERATORS or spelled in _SETTERS:
        named = (node.kwargs.get(key) for key in ("input", "self", "tensor"))
        first = node.args[0] if node.args else next(filter(None, named), None)
        return tuple(n for n in node.all_input_nodes if n is first)
    out = node.kwargs.get("out")
    outs = out if isinstance(out, tuple | list) else (out,)
    return tuple(value for value in outs if isinstance(value, Node))


_SETTERS = frozenset({"__setitem__", "set_data"})

_FLAGGED = frozenset({"relu", "relu6", "silu", "hardswish", "leaky_relu", "elu", "mish", "celu"})
"""Functions whose `inplace` may be given by its place."""

_IN_PLACE: Mapping[Any, Any] = {
    plain: getattr(operator, method) for method, plain in AUGMENTED.items()
}
"""What `x += y` calls, by what a proxy records of it: `operator.__iadd__` is `operator.iadd`."""

_RECORDED = {called: plain for plain, called in _IN_PLACE.items()}

_IN_PLACE_OPERATORS = frozenset({*_RECORDED, operator.setitem})


def writes(captured: Model, node: Node) -> tuple[Node, ...]:
    """Return the inputs of `node` that it writes into."""
    if node.op == "call_module":
        module = captured.module(str(node.target))
        return tuple(node.all_input_nodes[:1]) if _is_in_place(module) else ()
    if node.target in _IN_PLACE:  # A trace records `x += y` as `x + y`, and notes the node.
        first = node.args[0] if node in captured.region_of(node).augmented else None
        return (first,) if isinstance(first, Node) else ()
    return _written(node)


def _is_in_place(module: nn.Module) -> bool:
    """Return whether a module is told to write into its input; no child is looked for."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "inplace", False) is True
    return vars(module).get("inplace", getattr(type(module), "inplace", False)) is True


def changes_in_place(captured: Model, node: Node) -> bool:
    """Return whether `node` writes into its first input."""
    return bool(writes(captured, node))


def has_effect(node: Node) -> bool:
    """Return whether a line does more than return a value, by its spelling alone."""
    return bool(_written(node)) or node.is_impure()


def _name(node: Node) -> str:
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return str(getattr(packet, "__name__", ""))


def _is_torch(target: object) -> bool:
    module = str(getattr(target, "__module__", None) or "")
    kind = type(target).__module__
    return module.startswith(("torch", "_operator", "math", "builtins")) or kind.startswith("torch")


def is_number(node: Node) -> bool:
    """Return whether a value is made of sizes alone: a number, which nothing can write into."""
    name = function_name(node)
    if name in _NUMBERS or (name == "getattr" and node.args[1:2] in (("shape",), ("ndim",))):
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(is_number(n) for n in inputs)


class Memory:
    """The values of one graph by the memory that they may share.

    Args:
        graph: the graph.
        shared: the inputs of a node whose memory its value may share.
    """

    def __init__(self, graph: Graph, shared: Callable[[Node], tuple[Node, ...]]) -> None:
        self._place = {node: index for index, node in enumerate(graph.nodes)}
        self._shared = {node: shared(node) for node in graph.nodes}
        self._returned: dict[Node, list[Node]] = {}
        for node, inputs in self._shared.items():
            for source in inputs:
                self._returned.setdefault(source, []).append(node)

    def place(self, node: Node) -> int:
        """Return the place of `node` in the order of the graph."""
        return self._place[node]

    def later_readers(self, write: Node, written: Node) -> Iterator[tuple[Node, Node]]:
        """Yield (alias, reader): who reads memory of `written` after `write`, but through it.

        An alias that is made after the write is made by such a reader, and counts as it does.
        """
        for alias in self.family(write, written):
            if self._place[alias] > self._place[write]:
                continue
            for user in alias.users:
                if user is not write and self._place[user] > self._place[write]:
                    yield alias, user

    def family(self, write: Node, written: Node) -> list[Node]:
        """Return the values that may share memory with `written`, but for what `write` returns."""
        found, pending = {written: None}, [written]
        while pending:
            value = pending.pop()
            for other in (*self._shared[value], *self._returned.get(value, ())):
                if other not in found and other is not write:
                    found[other] = None
                    pending.append(other)
        return list(found)


def write_in_place(captured: Model, owner: str, graph: Graph, augmented: Collection[Node]) -> None:
    """Let `x += y` write where another name of x is read later; a trace has recorded x + y.

    Args:
        captured: the model.
        owner: the module whose own forward is in `graph`: targets are relative to it.
        graph: the forward.
        augmented: the nodes that such assignments made.
    """

    def shared(node: Node) -> tuple[Node, ...]:
        first = node.args[0] if node in augmented and node.args else None
        return (first,) if isinstance(first, Node) else shared_inputs(captured, node, owner)

    memory = Memory(graph, shared)
    for node in augmented:
        target: Any = _IN_PLACE.get(node.target)
        for first in shared(node) if target is not None else ():
            if not is_number(first) and any(True for _ in memory.later_readers(node, first)):
                node.target = target


def recorded(target: Any) -> Any:
    """Return what a proxy records of an operator: `operator.add` for `operator.iadd`."""
    return _RECORDED.get(target, target)


_OVERLAPPING = frozenset({"unfold", "as_strided"})
"""Methods whose views may hold an element several times: a write changes it as often."""


class Effects:
    """The writes of a captured model: which values they concern, and which tensors of the model.

    Args:
        captured: the model.
    """

    def __init__(self, captured: Model) -> None:
        self._captured = captured
        self._memory: dict[Graph, Memory] = {}

    def memory(self, node: Node) -> Memory:
        """Return the values of the graph of `node` by the memory that they may share."""
        if node.graph not in self._memory:
            self._memory[node.graph] = Memory(node.graph, self._shared)
        return self._memory[node.graph]

    def _shared(self, node: Node) -> tuple[Node, ...]:
        return writes(self._captured, node) or shared_inputs(self._captured, node)

    @cached_property
    def _writes(self) -> dict[Graph, list[_Write]]:
        """By graph: each write, and the values whose memory it writes."""
        found: dict[Graph, list[_Write]] = {}
        for region in self._captured.regions:
            found[region.graph] = [
                _Write(node, value, frozenset(self.memory(node).family(node, value)))
                for node in region.graph.nodes
                for value in writes(self._captured, node)
            ]
        return found

    @cached_property
    def _writes_into(self) -> dict[Node, list[_Write]]:
        """By value: the writes into its memory, in the order of the graph."""
        found: dict[Node, list[_Write]] = {}
        for graph_writes in self._writes.values():
            for write in graph_writes:
                for value in write.family:
                    found.setdefault(value, []).append(write)
        return found

    @cached_property
    def written_tensors(self) -> dict[str, Node]:
        """The parameters, buffers and attributes that a forward writes, and the call that does."""
        found: dict[str, Node] = {}
        for graph_writes in self._writes.values():
            for write in graph_writes:
                for value in write.family:
                    if value.op == "get_attr":
                        found.setdefault(str(value.target), write.node)
        return found

    def late_write(self, value: Node) -> tuple[Node, Node] | None:
        """Return a write into the memory of `value`, and who reads that memory after it.

        The graph shows that reader the value from before the write.
        """
        if not (found := self._writes_into.get(value)):
            return None
        memory = self.memory(value)
        for write in found:
            for other in write.family:
                if other.op == "call_method" and other.target in _OVERLAPPING:
                    return write.node, other  # what is written once is read by its neighbour, too
            for _, reader in memory.later_readers(write.node, write.written):
                return write.node, reader
        return None

    def parted(self, node: Node, value: Node) -> tuple[Node, Node] | None:
        """Return why the value of `node` cannot be its input `value` itself, or None.

        Returns:
            A write into the memory of the one, and what sees it of the other: a later reader, or
            the input or tensor of the model that it is.
        """
        seen = dict.fromkeys((*self._writes_into.get(node, ()), *self._writes_into.get(value, ())))
        if not seen:
            return None
        memory = self.memory(node)
        for write in sorted(seen, key=lambda write: memory.place(write.node)):
            if memory.place(write.node) <= memory.place(node):
                continue
            for own, other in ((value, node), (node, value)):
                if own not in write.family or other in write.family:
                    continue
                for alias in memory.family(write.node, other):
                    if alias.op in ("placeholder", "get_attr"):
                        return write.node, alias
                    for reader in alias.users:
                        later = memory.place(reader) > memory.place(write.node)
                        if later and reader is not node:
                            return write.node, reader
        return None

    def written_between(self, value: Node, first: Node, last: Node) -> Node | None:
        """Return what writes into the memory of `value` after `first` and before `last`."""
        place = self.memory(value).place
        for write in self._writes_into.get(value, ()):
            if place(first) < place(write.node) < place(last):
                return write.node
        return None


@dataclass(frozen=True, eq=False)
class _Write:
    node: Node
    written: Node
    family: frozenset[Node]
