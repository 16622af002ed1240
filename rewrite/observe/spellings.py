"""What the aten operators of an exported call do to a value: move it, read its form, scale it.

Names are those of the overload packets: `aten.view.default` and `aten.view.dtype` are "view".
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

SAME: frozenset[str] = frozenset(
    {"to", "_to_copy", "clone", "contiguous", "detach", "detach_", "alias", "lift_fresh",
     "lift_fresh_copy", "type_as", "dropout", "feature_dropout", "alpha_dropout", "float",
     "double", "half", "bfloat16"}
)  # fmt: skip
"""The value itself, perhaps in another type (dropout in eval mode too)."""

MOVES: frozenset[str] = frozenset(
    {"view", "reshape", "_unsafe_view", "permute", "transpose", "t", "numpy_T", "unsqueeze",
     "squeeze", "expand", "expand_as", "slice", "select", "split", "split_with_sizes", "chunk",
     "unbind", "narrow", "cat", "concat", "concatenate", "stack", "flatten", "unflatten", "roll",
     "flip", "movedim", "moveaxis", "swapaxes", "swapdims", "repeat", "repeat_interleave", "index",
     "index_select", "tile", "hstack", "vstack", "mT", "view_as", "reshape_as", "diagonal",
     "broadcast_to", "unsafe_split", "tensor_split", "unfold", "pixel_unshuffle"}
)  # fmt: skip
"""Every element of the result is an element of an input."""

FORM: frozenset[str] = frozenset(
    {"_assert_tensor_metadata", "sym_size", "sym_stride", "sym_numel", "zeros_like", "ones_like",
     "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty",
     "new_full", "size", "dim", "numel", "_shape_as_tensor"}
)  # fmt: skip
"""Reads the shape or type of its input, not its values."""

SCALES: frozenset[str] = frozenset({"mul", "div", "true_divide", "multiply", "divide"})
"""Multiplies by another value: what a scale per channel passes through, and a shift does not."""

PAD: Mapping[str, Any] = {"constant_pad_nd": 0, "pad": 0}


def op_name(node: Node) -> str:
    """Return the plain name of the operator that `node` calls, "getitem" for an index."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Return the shape of the value of `node`, or None where it is no tensor of known shape."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    if not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


def number(value: Any) -> float | None:
    """Return a plain number as it is, None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return one argument of a call, by its position or by its name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
