"""Multiplications and additions by a constant per channel.

    y = c * x,  y = x / c,  y = a x + b c      c: one value per channel, made of parameters
    y = d + v c x,  y = d + v x / c            addcmul, addcdiv: d and c such values
    y = x + w (c - x)                          lerp

A constant is a parameter or buffer, or what a forward computes from those alone (torchvision's
FrozenBatchNorm2d reshapes four buffers and combines them). It is evaluated in float64. A
tensor that a forward writes into is none.
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
from rewrite.affine.laws import cast_refusal
from rewrite.graph.captured import Captured
from rewrite.graph.effects import changes_in_place
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import function_name
from rewrite.graph.traits import Call, Trait, call_of, has, named
from rewrite.outcomes import Declined

_FUSED = ("addcmul", "addcdiv", "lerp")
"""A product and a sum in one call, of three operands."""


@dataclass(frozen=True)
class ChannelConstant:
    """A call that multiplies, or adds to, each channel of `operand` a constant of its own.

    `axis` counts the channels from the end; `root` is the parameter it is made of, if one only.
    """

    node: Node
    operand: Node
    axis: int
    affine: Affine
    root: str | None


class Constants:
    """The values of a captured model that depend on parameters and buffers alone."""

    def __init__(self, captured: Captured, ranks: Ranks | None = None) -> None:
        self._captured = captured
        self._ranks = ranks or Ranks(captured)
        self._values: dict[Node, Tensor | None] = {}
        self._constant: set[Node] = set()
        for node in captured.nodes():
            if self._is_constant(node):
                self._constant.add(node)

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            return self._captured.is_fixed(node)
        if node.op not in ("call_function", "call_method"):
            return False
        inputs = node.all_input_nodes
        if not inputs or not all(source in self._constant for source in inputs):
            return False
        call = call_of(self._captured, node)
        if call is None or Trait.PURE not in call.operation.traits:
            return False
        if Trait.CASTS in call.operation.traits and cast_refusal(self._captured, call):
            return False
        return not changes_in_place(self._captured, node)

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
        if has(node, Trait.CASTS):
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
        found = self.at(node)
        return found if isinstance(found, ChannelConstant) else None

    def at(self, node: Node) -> ChannelConstant | Declined | None:
        """Return how `node` combines a value and a constant per channel, None if it does not.

        Declined is what does so in another way than a product or a sum, or not alone, and what
        multiplies or adds something else: one number for all channels, a table of positions.
        """
        if node.op not in ("call_function", "call_method"):
            return None
        constants = [n for n in node.all_input_nodes if n in self._constant]
        others = [n for n in node.all_input_nodes if n not in self._constant]
        if constants and others and named(node, *_FUSED):
            return self._fused(node, constants, others)
        if len(constants) != 1 or len(others) != 1:
            return None
        value, operand = self.value(constants[0]), others[0]
        if value is None:
            return None
        call = call_of(self._captured, node)
        axes = [axis for axis in range(value.dim()) if value.shape[axis] > 1]
        if len(axes) != 1:
            return _of_other_shape(call, value)
        if call is None:
            return Declined(
                f"{function_name(node) or node.target} is not an operation that folding knows",
                (node,),
            )
        affine = self._affine(call, constants[0], value.flatten())
        if affine is None or isinstance(affine, Declined):
            return affine
        axis = axes[0] - value.dim()
        if (reason := self._unfit(call, operand, value, axis)) is not None:
            return Declined(reason, (node,))
        roots = self.roots(constants[0])
        root = next(iter(roots)) if len(roots) == 1 else None
        return ChannelConstant(node, operand, axis, affine, root)

    def _fused(
        self, node: Node, constants: list[Node], others: list[Node]
    ) -> ChannelConstant | Declined | None:
        """Return what a product and a sum in one call do to each channel."""
        call = call_of(self._captured, node)
        values = {constant: self.value(constant) for constant in constants}
        if call is None or any(value is None for value in values.values()):
            return None
        if len(others) > 1:
            return Declined("combines two values with the constant in one call", (node,))
        affine = _fused_affine(call, others[0], values)
        if isinstance(affine, Declined):
            return affine
        scale = affine.scale + torch.zeros_like(affine.shift)
        shift = affine.shift + torch.zeros_like(affine.scale)
        axes = [axis for axis in range(scale.dim()) if scale.shape[axis] > 1]
        if len(axes) != 1:
            return _of_shape(scale)
        axis = axes[0] - scale.dim()
        if (reason := self._unfit(call, others[0], scale, axis)) is not None:
            return Declined(reason, (node,))
        roots = {root for constant in constants for root in self.roots(constant)}
        root = next(iter(roots)) if len(roots) == 1 else None
        return ChannelConstant(
            node, others[0], axis, Affine(scale.flatten(), shift.flatten()), root
        )

    def _affine(self, call: Call, constant: Node, value: Tensor) -> Affine | Declined | None:
        """Return the map of a call, None if it is no such operation."""
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if (terms := call.terms()) is not None and len(call.node.args) < 3:
            (first, a), (second, b) = terms
            scale, weight = (a, b) if second is constant else (b, a)
            if constant not in (first, second):
                return None
            return Affine(one * scale, value * weight)
        if call.name == "mul":
            return Affine(value, zero)
        if call.name == "div":
            if call.get("rounding_mode") is not None:
                return Declined("rounds its quotient", (call.node,))
            if call.operand is constant:
                return Declined("divides a constant by the value", (call.node,))
            return Affine(value.reciprocal(), zero)
        if call.name in ("floor_divide", "remainder", "fmod"):
            return Declined("rounds its quotient", (call.node,))
        return None

    def _unfit(self, call: Call, operand: Node, value: Tensor, axis: int) -> str | None:
        """Return why a value is more than one channel for each number, or is written into."""
        size, rank = self._ranks.size(operand, axis), self._ranks.rank(operand)
        if size is not None and size != value.numel():
            return f"it has {value.numel()} numbers for {size} channels"
        if rank is not None and rank < value.dim():
            return f"it gives a value of {rank} axes {value.dim()}"
        if not changes_in_place(self._captured, call.node):
            return None
        if call.operand is not operand:
            return "it writes into the constant"
        effects = self._captured.effects
        family = effects.memory(operand).family(call.node, operand)
        if any(alias.op in ("placeholder", "get_attr") for alias in family):
            return "it writes into what the model is given or holds"
        if effects.late_write(operand) is not None:
            return "it writes into a value that is read elsewhere"
        return None


def _of_other_shape(call: Call | None, value: Tensor) -> Declined | None:
    """Return why a product or a sum with a constant is no map per channel, None for other calls."""
    if call is None or not (call.terms() is not None or call.name in ("mul", "div")):
        return None
    return _of_shape(value)


def _of_shape(value: Tensor) -> Declined:
    """Return why a constant of this shape is no value per channel."""
    if value.numel() < 2:
        return Declined("the constant is one number for all channels, not one a channel", ())
    shape = "x".join(map(str, value.shape))
    return Declined(f"the constant ({shape}) differs along several axes, not by channel alone", ())


def _fused_affine(
    call: Call, operand: Node, values: Mapping[Node, Tensor | None]
) -> Affine | Declined:
    """Return the map that a call of three operands is in one of them."""
    places = ("end", "weight") if call.name == "lerp" else ("tensor1", "tensor2", "value")
    terms: list[Affine] = []
    for given in (call.operand, *(call.get(name, 1) for name in places)):
        scale = torch.tensor(float(given is operand), dtype=torch.float64)
        if given is operand:
            terms.append(Affine(scale, torch.zeros_like(scale)))
            continue
        held = values.get(given) if isinstance(given, Node) else given
        if not isinstance(held, int | float | Tensor):
            return Declined("one of its operands is no constant", (call.node,))
        terms.append(Affine(scale, torch.as_tensor(held, dtype=torch.float64)))
    first, second, third = terms[:3]
    if call.name == "lerp":  # x + w (e - x)
        second = Affine(second.scale - first.scale, second.shift - first.shift)
    elif call.name == "addcdiv":
        if bool(third.scale.any()):
            return Declined("divides a constant by the value", (call.node,))
        third = Affine(third.scale, third.shift.reciprocal())
    if bool(second.scale.any()) and bool(third.scale.any()):
        return Declined("multiplies the value by itself", (call.node,))
    times = terms[3].shift if len(terms) > 3 else 1.0
    return Affine(
        first.scale + times * (second.scale * third.shift + second.shift * third.scale),
        first.shift + times * second.shift * third.shift,
    )
