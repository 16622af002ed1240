"""Multiplications and additions by a constant per channel.

    y = c * x,  y = x + c,  y = x - c,  y = x / c      c: one value per channel, made of parameters

A constant is a parameter or buffer, or what a forward computes from those alone (torchvision's
FrozenBatchNorm2d reshapes four buffers and combines them). It is evaluated in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from rewrite.affine.algebra import Affine
from rewrite.graph.captured import Captured
from rewrite.graph.spellings import function_name

_PURE = frozenset(
    {
        "add", "sub", "mul", "div", "truediv", "neg", "rsqrt", "sqrt", "exp", "pow", "reciprocal",
        "view", "reshape", "unsqueeze", "squeeze", "expand", "flatten", "getitem", "to", "float",
        "double", "contiguous", "abs", "softplus", "sigmoid", "tanh", "clamp", "t", "transpose",
        "permute", "type", "type_as",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ChannelConstant:
    """A call that multiplies, or adds to, each channel of `operand` a constant of its own.

    `axis` counts the channels from the end; `root` is the parameter it is made of, if one only;
    `recipe` says how to make it of another checkpoint's tensors (`rewrite.fold.recipes`).
    """

    node: Node
    operand: Node
    axis: int
    affine: Affine
    root: str | None
    recipe: Mapping[str, Any]


class Constants:
    """The values of a captured model that depend on parameters and buffers alone."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._constant: set[Node] = set()
        self._values: dict[Node, Tensor | None] = {}
        for node in captured.nodes():
            if self._is_constant(node):
                self._constant.add(node)

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            return True
        if node.op not in ("call_function", "call_method"):
            return False
        inputs = node.all_input_nodes
        return (
            bool(inputs)
            and all(source in self._constant for source in inputs)
            and function_name(node) in _PURE
        )

    def value(self, node: Node) -> Tensor | None:
        """Return the float64 value of a constant, or None if `node` is none or has no value."""
        if node not in self._constant:
            return None
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def _evaluate(self, node: Node) -> Tensor | None:
        if node.op == "get_attr":
            return self._attribute(node)
        values = {source: self.value(source) for source in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        if function_name(node) in ("to", "float", "double", "contiguous", "type", "type_as"):
            return values[node.all_input_nodes[0]]
        args: Any = map_arg(node.args, values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    def _attribute(self, node: Node) -> Tensor | None:
        held = self._captured.region_of(node).constants.get(str(node.target))
        if held is None:
            owner, _, attr = str(node.target).rpartition(".")
            held = getattr(self._captured.module(owner), attr, None)
        if not isinstance(held, Tensor) or not held.is_floating_point() or held.is_meta:
            return None
        return held.detach().double()

    def roots(self, node: Node) -> set[str]:
        """Return the names of the parameters and buffers that a constant is made of."""
        if node.op == "get_attr":
            return {str(node.target)}
        return {name for source in node.all_input_nodes for name in self.roots(source)}

    def channel_constant(self, node: Node) -> ChannelConstant | None:
        """Return what `node` does to each channel, if it scales or shifts it by a constant."""
        name = function_name(node)
        if name not in ("add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv"):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        one, other = node.args
        if not isinstance(one, Node) or not isinstance(other, Node):
            return None
        if (one in self._constant) == (other in self._constant):
            return None
        constant, operand = (one, other) if one in self._constant else (other, one)
        if constant is one and name in ("sub", "isub", "div", "truediv", "itruediv"):
            return None
        value = self.value(constant)
        if value is None or value.numel() < 2:
            return None
        axes = [axis for axis in range(value.dim()) if value.shape[axis] > 1]
        if len(axes) != 1:
            return None
        affine = _affine(name, value.flatten())
        roots = self.roots(constant)
        root = next(iter(roots)) if len(roots) == 1 else None
        recipe = _recipe(name, root, roots)
        return ChannelConstant(node, operand, axes[0] - value.dim(), affine, root, recipe)


def _recipe(name: str, root: str | None, roots: set[str]) -> dict[str, Any]:
    operation = name.removeprefix("i").removeprefix("true")
    target = root or ", ".join(sorted(roots))
    if root is None:
        reason = "is computed from several tensors, which the map of keys does not repeat"
        return {"is": "other", "target": target, "reason": reason}
    return {"is": "constant", "target": target, "operation": operation, "key": root}


def _affine(name: str, value: Tensor) -> Affine:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if name in ("add", "iadd"):
        return Affine(one, value)
    if name in ("sub", "isub"):
        return Affine(one, -value)
    if name in ("mul", "imul"):
        return Affine(value, zero)
    return Affine(value.reciprocal(), zero)
