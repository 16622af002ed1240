"""Which values of a graph may share memory, and who reads that memory after a write.

    n : v ← f(v)     in place, is      n = f(v)     if no alias of v is read after n,
                                        n = f(v)     with v replaced by n in the later readers of v

The second only where all of them read v itself: a view that was taken before the write would have
to be taken again. An operation that nothing is known of may return any of its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.captured import Captured
from rewrite.graph.spellings import function_name
from rewrite.tracing.tracer import is_leaf

_VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "getitem", "chunk", "split",
     "split_with_sizes", "tensor_split", "unbind", "squeeze", "unsqueeze", "expand", "expand_as",
     "view_as", "narrow", "select", "t", "movedim", "swapaxes", "moveaxis", "diagonal", "detach",
     "contiguous", "to", "type_as", "float", "half", "double", "bfloat16", "type", "getattr",
     "unfold", "ravel", "as_strided", "broadcast_to", "broadcast_tensors", "real", "imag",
     "pad",
     "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
     "feature_alpha_dropout", "reshape_as", "atleast_1d", "atleast_2d", "atleast_3d", "cuda", "cpu",
     "clone_if_needed", "rearrange", "stochastic_depth", "drop_path", "tuple", "list"}
)  # fmt: skip
"""What may return its input, or a part of it, by the function's plain name."""

_SHARING_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.ConstantPad2d,
    nn.modules.dropout._DropoutNd,
)  # fmt: skip

_NUMBERS = frozenset({"size", "dim", "numel", "len", "ndimension", "stride", "element_size"})


def shared_inputs(captured: Captured, node: Node, prefix: str = "") -> tuple[Node, ...]:
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
        if getattr(module, "inplace", False) is True:
            return inputs[:1]
        return () if is_leaf(module) and not isinstance(module, _SHARING_MODULES) else inputs
    if node.op == "output":
        return ()
    name = function_name(node) or ""
    if name in _VIEWS:
        return inputs[:1] if name not in ("broadcast_tensors", "tuple", "list") else inputs
    if writes := _written(node):
        return writes
    if node.op == "call_function" and not _is_torch(node.target):
        return inputs  # Somebody's function, called as one node: it may return what it gets.
    return ()


def _written(node: Node) -> tuple[Node, ...]:
    """Return the input that an operation spelled in place returns."""
    spelled = str(node.target) if node.op == "call_method" else _name(node)
    plain = spelled.endswith("_") and not spelled.endswith("__")
    if plain or node.kwargs.get("inplace") or node.target in _IN_PLACE_OPERATORS:
        return tuple(node.all_input_nodes[:1])
    out = node.kwargs.get("out")
    return (out,) if isinstance(out, Node) else ()


_IN_PLACE_OPERATORS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
     operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
     operator.ilshift, operator.irshift, operator.setitem}
)  # fmt: skip


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", ""))


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
        self._shared = shared
        self._place = {node: index for index, node in enumerate(graph.nodes)}
        self._returned: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            for source in shared(node):
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
            for other in (*self._shared(value), *self._returned.get(value, ())):
                if other not in found and other is not write:
                    found[other] = None
                    pending.append(other)
        return list(found)
