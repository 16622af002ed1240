"""What the aten operators of an exported call do to a value: move, scale, multiply by a weight.

    linear      x (.., i) @ W (o, i)ᵀ + b       addmm       x (n, i) @ W (i, o) + b     (Conv1D)
    matmul      x (.., i) @ W (.., i, o)        or W (.., o, i) @ x (.., i, n)
    grouped_mm  x (n, i) @ W (e, i, o)          convolution W (o, i, k..) * x (n, i, ..)

Names are those of the overload packets: `aten.view.default` and `aten.view.dtype` are "view".
"""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass
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


def pads_nothing(node: Node) -> bool:
    """Return whether `node` is a padding by constants, of which it adds none at this size."""
    if op_name(node) not in ("pad", "constant_pad_nd"):
        return False
    sizes = argument(node, 1, "pad")
    return isinstance(sizes, list | tuple) and all(size == 0 for size in sizes)


def number(value: Any) -> float | None:
    """Return a plain number as it is, None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return one argument of a call, by its position or by its name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class Contraction:
    """A product over one axis of a value and one axis of a weight, and the bias that is added."""

    value: Node
    value_axis: int
    weight: Node
    weight_axis: int
    bias: Node | None = None
    no_shift: str = ""


def contraction_of(node: Node, values: Container[Node]) -> Contraction | None:
    """Return the product that `node` computes of one of `values`, or None."""
    name = op_name(node)
    if name == "linear":
        value, weight, bias = (
            argument(node, i, key) for i, key in enumerate(("input", "weight", "bias"))
        )
        if value in values and isinstance(weight, Node):
            return Contraction(value, -1, weight, -1, bias)
    elif name == "addmm" and not node.kwargs and len(node.args) == 3:
        bias, value, weight = node.args
        if value in values and isinstance(value, Node) and isinstance(weight, Node):
            return Contraction(value, -1, weight, 0, bias if isinstance(bias, Node) else None)
    elif name in ("mm", "bmm", "matmul", "_grouped_mm", "grouped_mm"):
        return _product(node, name, values)
    elif name in _CONVOLUTIONS:
        return _convolution(node, _CONVOLUTIONS[name], values)
    elif name == "einsum":
        return _einsum(node, values)
    return None


def _product(node: Node, name: str, values: Container[Node]) -> Contraction | None:
    first, second = node.args[:2]
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None
    left, right = shape_of(first), shape_of(second)
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    if first in values:
        return Contraction(first, -1, second, -2)
    if second in values and not name.endswith("grouped_mm"):
        return Contraction(second, -2, first, -1)
    return None


def _convolution(node: Node, dims: int, values: Container[Node]) -> Contraction | None:
    keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    value, weight, bias, _, padding, _, groups = (argument(node, i, k) for i, k in enumerate(keys))
    shape = shape_of(value) if isinstance(value, Node) else None
    if value not in values or shape is None or len(shape) != dims + 2 or groups not in (None, 1):
        return None
    pads = (
        padding == "same" or (isinstance(padding, list | tuple) and any(padding)) or padding in (1,)
    )
    why = f"{op_name(node)} pads its input with zeros, and a shift would have to shift those too"
    return Contraction(value, 1, weight, 1, bias, why if pads else "")


def _einsum(node: Node, values: Container[Node]) -> Contraction | None:
    equation, operands = node.args[0], node.args[1]
    if (
        not isinstance(equation, str)
        or not isinstance(operands, list | tuple)
        or len(operands) != 2
    ):
        return None
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if "." in equation or len(names) != 2 or not result:
        return None
    place = next((i for i, operand in enumerate(operands) if operand in values), None)
    if place is None or operands[1 - place] in values:
        return None
    shared = [c for c in names[place] if c in names[1 - place] and c not in result]
    weight, value = operands[1 - place], operands[place]
    if len(shared) != 1 or not isinstance(weight, Node) or not isinstance(value, Node):
        return None
    letter = shared[0]
    return Contraction(value, names[place].index(letter), weight, names[1 - place].index(letter))
