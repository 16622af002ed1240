"""What the aten operators of an exported call do to a value: move, scale, multiply by a weight.

    linear      x (.., i) @ W (o, i)ᵀ + b       addmm       x (n, i) @ W (i, o) + b     (Conv1D)
    matmul      x (.., i) @ W (.., i, o)        or W (.., o, i) @ x (.., i, n)
    grouped_mm  x (n, i) @ W (e, i, o)          convolution W (o, i, k..) * x (n, i, ..)

Names are those of the overload packets: `aten.view.default` and `aten.view.dtype` are "view". What
each operator does to a value is a row of `rewrite.graph.traits`.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewrite.graph.traits import Shape, Trait, argument, spelled, spelled_where

_DROPS = spelled_where(lambda row: Trait.DROPS in row.traits)

SAME: frozenset[str] = frozenset({"detach_"}) | spelled_where(
    lambda row: (
        Trait.IDENTITY in row.traits and Trait.MOVES not in row.traits and row.shape is Shape.SAME
    )
)
"""The value itself, perhaps in another type (dropout in eval mode too)."""

MOVES: frozenset[str] = spelled_where(lambda row: Trait.MOVES in row.traits) - {
    "fold", "im2col", "gather",
}  # fmt: skip
"""Every element of the result is an element of an input; `fold` adds, `im2col` pads, `gather`
chooses each element by a value."""

FORM: frozenset[str] = spelled_where(lambda row: Trait.ASKS in row.traits)
"""Reads the shape or type of its input, not its values."""

SCALES: frozenset[str] = spelled("mul", "div")
"""Multiplies by another value: what a scale per channel passes through, and a shift does not."""


def op_name(node: Node) -> str:
    """Return the plain name of the operator that `node` calls, "getitem" for an index.

    An operator of another namespace than aten has that before its name, "own::mul": what it
    computes is not known by its name. A quotient that is rounded is no "div".
    """
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace != "aten":
            return f"{node.target.namespace}::{node.target.overloadpacket.__name__}"
        name = str(node.target.overloadpacket.__name__)
        return name if node.kwargs.get("rounding_mode") is None else f"{name} and round"
    return str(getattr(node.target, "__name__", node.target))


def is_active_dropout(node: Node) -> bool:
    """Return whether `node` sets values to zero at random, or may."""
    return op_name(node) in _DROPS and argument(node, 2, "train") is not False


def casts_to_integers(node: Node) -> bool:
    """Return whether `node` makes integers or truth values of floating point numbers."""
    held, made = (
        value.meta.get("val") if isinstance(value, Node) else None
        for value in (node.args[0] if node.args else None, node)
    )
    if not isinstance(held, torch.Tensor) or not isinstance(made, torch.Tensor):
        return False
    return held.is_floating_point() and not made.is_floating_point()


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
