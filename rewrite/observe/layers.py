"""Calls that multiply a value by a weight along one axis: what reads channels.

linear      x (.., i) @ W (o, i)ᵀ + b       addmm       x (n, i) @ W (i, o) + b     (Conv1D)
matmul      x (.., i) @ W (.., i, o)        or W (.., o, i) @ x (.., i, n)
grouped_mm  x (n, i) @ W (e, i, o)          convolution W (o, i, k..) * x (n, i, ..)
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch.fx import Node

from rewrite.observe.spellings import argument, op_name, shape_of

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
