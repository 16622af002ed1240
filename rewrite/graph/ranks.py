"""Infer the rank of values, and the length of axes, from the graph alone.

With example inputs both are known. Without them, layers tell: what a two-dimensional convolution
returns has four axes (its input is taken to be batched), `flatten(1)` leaves two, an elementwise
operation keeps what it is given. What nothing tells stays None, and whoever asks has to refuse.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd

from rewrite.graph.captured import Captured
from rewrite.graph.operators import conv_of, linear_of, norm_of
from rewrite.graph.spellings import function_name, is_getitem, is_plain
from rewrite.graph.traits import SPATIAL, Call, Shape, Trait, call_of, has, operation


class Ranks:
    """The number of axes of every value of a captured model, and the length of an axis."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._ranks: dict[Node, int | None] = {}
        self._sizes: dict[tuple[Node, int], int | None] = {}
        for node in captured.nodes():
            self._ranks[node] = self._infer(node)

    def rank(self, node: Node) -> int | None:
        """Return the number of axes of a value, or None if the graph does not tell."""
        return self._ranks.get(node)

    def from_end(self, node: Node, axis: int) -> int:
        """Return `axis` of a value counted from the end, if its rank is known; else as given."""
        rank = self.rank(node)
        return axis - rank if rank is not None and axis >= 0 else axis

    def size(self, node: Node, axis: int) -> int | None:
        """Return the length of `axis` (counted from the end) of a value, or None if unknown."""
        if axis >= 0:
            return None
        if (node, axis) not in self._sizes:
            self._sizes[node, axis] = self._find_size(node, axis)
        return self._sizes[node, axis]

    def _find_size(self, node: Node, axis: int) -> int | None:
        seen = 0
        current = node
        while seen < 64:
            seen += 1
            known = self._size_here(current, axis)
            if known is not None:
                return known
            step = _channels_kept(self._captured, current, axis)
            if step is None:
                return self._joined_size(current, axis)
            current = step
        return None

    def concatenated(self, node: Node) -> tuple[Any, Any] | None:
        """Return what a concatenation puts together and along which axis, None for other calls.

        Both are as the call says them: a list or tuple of values, and a number, unless they are
        computed.
        """
        call = call_of(self._captured, node)
        if call is None or call.name != "cat":
            return None
        return node.args[0] if node.args else node.kwargs.get("tensors"), call.get("dim", 0)

    def _joined_size(self, node: Node, axis: int) -> int | None:
        parts, dim = self.concatenated(node) or (None, None)
        if not isinstance(parts, list | tuple) or not isinstance(dim, int):
            return None
        if self.from_end(node, dim) != axis:
            return self.size(parts[0], axis) if isinstance(parts[0], Node) else None
        sizes = [self.size(part, axis) if isinstance(part, Node) else None for part in parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _size_here(self, node: Node, axis: int) -> int | None:
        shape = self._captured.shape(node)
        if shape is not None:
            return shape[axis] if -axis <= len(shape) else None
        if (conv := conv_of(self._captured, node)) is not None:
            if axis != -(conv.dims + 1):
                return None
            weight = self._captured.tensor(conv.weight)
            return weight.shape[1] * conv.groups if conv.transposed else weight.shape[0]
        if (linear := linear_of(self._captured, node)) is not None:
            return self._captured.tensor(linear.weight).shape[0] if axis == -1 else None
        norm = norm_of(self._captured, node)
        if norm is not None and self.from_end(node, norm.channel_axis) == axis:
            return norm.num_features
        return None

    def _infer(self, node: Node) -> int | None:
        shape = self._captured.shape(node)
        if shape is not None:
            return len(shape)
        if node.op == "get_attr":
            return self._attribute_rank(node)
        if node.op in ("placeholder", "output"):
            return None
        if node.op == "call_module":
            return self._module_rank(node)
        if (conv := conv_of(self._captured, node)) is not None:
            return conv.dims + 2
        return self._function_rank(node)

    def _attribute_rank(self, node: Node) -> int | None:
        value: Any = self._captured.region_of(node).constants.get(str(node.target))
        if value is None:
            owner, _, attr = str(node.target).rpartition(".")
            try:
                value = getattr(self._captured.module(owner), attr, None)
            except KeyError:
                return None
        return value.dim() if isinstance(value, torch.Tensor) else None

    def _module_rank(self, node: Node) -> int | None:
        module = self._captured.module(str(node.target))
        if isinstance(module, _ConvNd) and is_plain(module):
            return len(module.kernel_size) + 2
        if isinstance(module, nn.BatchNorm2d):
            return 4
        if isinstance(module, nn.BatchNorm3d):
            return 5
        before = self._input_rank(node)
        if getattr(module, "return_indices", False):
            return None
        if isinstance(module, nn.Flatten):
            return _flattened(before, module.start_dim, module.end_dim)
        if isinstance(module, nn.Unflatten):
            sizes = module.unflattened_size
            return None if before is None else before + len(tuple(sizes)) - 1
        if type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
            module, nn.RNNBase | nn.Embedding | nn.MultiheadAttention | nn.Transformer
        ):
            return before
        return None

    def _function_rank(self, node: Node) -> int | None:
        before = self._input_rank(node)
        if node.target is F.batch_norm or "batch_norm" in (function_name(node) or ""):
            owner = self._captured.module(self._captured.owner(node))
            fixed = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
            return next((r for kind, r in fixed.items() if isinstance(owner, kind)), before)
        if is_getitem(node):
            return self._item_rank(node)
        call = call_of(self._captured, node)
        if call is None or call.get("return_indices", False):
            return None
        match call.operation.shape:
            case Shape.SAME if call.operation.traits & (Trait.LIKE_SECOND | Trait.CASTS):
                return before  # the other operand gives its dtype alone
            case Shape.SAME:
                ranks = [self._ranks.get(n) for n in node.all_input_nodes]
                known = [r for r in ranks if r is not None]
                return max(known) if known and len(known) == len(ranks) else None
            case Shape.SAME_RANK:
                return before
            case Shape.REDUCED:
                return _reduced(before, call)
            case Shape.FLATTENED:
                return _flattened(before, call.get("start_dim", 0), call.get("end_dim", -1))
            case Shape.LISTED:
                return _listed(call)
            case Shape.LIKE_SECOND:
                other = call.get("other")
                return self._ranks.get(other) if isinstance(other, Node) else None
            case Shape.LONGER:
                return None if before is None else before + 1
        return None

    def _item_rank(self, node: Node) -> int | None:
        source, index = node.args
        if not isinstance(source, Node):
            return None
        if has(source, Trait.SPLITS):
            rank = self._input_rank(source)
            row = operation(source)
            return None if rank is None or row is None else rank - (row.name == "unbind")
        rank = self._ranks.get(source)
        items = index if isinstance(index, tuple) else (index,)
        if rank is None or any(isinstance(i, Node | list | bool) for i in items):
            return None
        return rank - sum(isinstance(i, int) for i in items) + sum(i is None for i in items)

    def _input_rank(self, node: Node) -> int | None:
        inputs = node.all_input_nodes
        return self._ranks.get(inputs[0]) if inputs else None


def _flattened(before: int | None, start: Any, end: Any) -> int | None:
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    if end == -1 and start >= 0:
        return start + 1
    if before is None:
        return None
    return before - ((end % before) - (start % before))


def _reduced(before: int | None, call: Call) -> int | None:
    dims = call.get("dim")
    if before is None or dims is None or isinstance(dims, bool | Node):
        return None
    if call.get("keepdim", False):
        return before
    return before - (len(dims) if isinstance(dims, list | tuple) else 1)


def _listed(call: Call) -> int | None:
    sizes = call.get(call.operation.arguments[0].lstrip("*").partition("|")[0])
    if not isinstance(sizes, list | tuple) or (
        len(sizes) == 1 and isinstance(sizes[0], Node | torch.dtype)
    ):
        return None  # computed; or a view of the bits as another dtype, which lists no sizes
    return len(sizes) or None


def _channels_kept(captured: Captured, node: Node, axis: int) -> Node | None:
    """Return the input whose `axis` is as long as that of the value, if an operation keeps it."""
    inputs = node.all_input_nodes
    if len(inputs) != 1:
        return None
    call = call_of(captured, node)
    if call is None or call.node.op == "output":
        return None
    if call.operation.shape is Shape.SAME and call.name != "normalize":
        return inputs[0]
    mixes = call.operation.mixes
    # A pool over k axes takes its channels to be the axis before them.
    pools = call.operation.shape is Shape.SAME_RANK and mixes not in (0, SPATIAL)
    return inputs[0] if pools and axis == -(mixes + 1) else None
