"""Multiplications and additions by a constant per channel.

    y = c * x,  y = x / c,  y = a x + b c      c: one value per channel, made of parameters
    y = d + v c x,  y = d + v x / c            addcmul, addcdiv: d and c such values
    y = x + w (c - x)                          lerp
    y[..c..] = x[..c..] v[c]                   einsum "nchw,c->nchw"

What else combines a value with a constant per channel is declined with its name, so that it leaves
a skip: `maximum`, a power, a product of matrices, a function that nobody knows. A constant is a
parameter or buffer, or what a forward computes from those alone (torchvision's FrozenBatchNorm2d
reshapes four buffers and combines them). It is evaluated in float64. A tensor that a forward
writes into is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from rewrite.affine.algebra import Affine
from rewrite.affine.channel_axis import diagonal_axis
from rewrite.affine.laws import calls_layer, cast_refusal, computed_from
from rewrite.graph.captured import Captured
from rewrite.graph.effects import changes_in_place
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import function_name
from rewrite.graph.traits import Call, Trait, call_of, has, named
from rewrite.outcomes import Declined

_FUSED = ("addcmul", "addcdiv", "lerp")
"""A product and a sum in one call, of three operands."""

_NO_COMBINATION = (
    Trait.LAYER | Trait.MOVES | Trait.JOINS | Trait.SPLITS | Trait.ASKS | Trait.CASTS
    | Trait.LIKE_SECOND
)  # fmt: skip
"""Layers, and what reads of the one operand no number, or none together with the other's."""

_DOES = {
    "maximum": "takes the larger of the value and the constant",
    "minimum": "takes the smaller of the value and the constant",
    "max": "takes the larger of the value and the constant",
    "min": "takes the smaller of the value and the constant",
    "clamp": "bends the value at the constant", "clamp_min": "bends the value at the constant",
    "clamp_max": "bends the value at the constant", "prelu": "bends the value at zero",
    "pow": "takes a power", "where": "chooses between the value and the constant",
    "floor_divide": "rounds its quotient", "remainder": "rounds its quotient",
    "fmod": "rounds its quotient",
}  # fmt: skip
"""What known operations do that is no product and no sum."""


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


class _Evaluated:
    """The values of a captured model that depend on parameters and buffers alone."""

    def __init__(self, captured: Captured, ranks: Ranks | None = None) -> None:
        self._captured = captured
        self._ranks = ranks or Ranks(captured)
        self._values: dict[Node, Tensor | None] = {}
        self._constant: set[Node] = set()
        self._not_evaluated: dict[Node, str] = {}
        for node in captured.nodes():
            if self._is_constant(node):
                self._constant.add(node)
            elif reason := self._why_not_evaluated(node):
                self._not_evaluated[node] = reason

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            return self._captured.is_fixed(node)
        if node.op not in ("call_function", "call_method"):
            return False
        inputs = computed_from(node)
        if not inputs or not all(source in self._constant for source in inputs):
            return False
        call = call_of(self._captured, node)
        if call is None or Trait.PURE not in call.operation.traits:
            return False
        if Trait.CASTS in call.operation.traits and cast_refusal(self._captured, call):
            return False
        return not changes_in_place(self._captured, node)

    def _why_not_evaluated(self, node: Node) -> str:
        """Return why what depends on tensors of the model alone is no constant, or ""."""
        if node.op == "get_attr":
            return f"the forward writes {node.target} or makes it anew, so it is no constant"
        inputs = computed_from(node)
        if node.op not in ("call_function", "call_method") or not inputs:
            return ""
        if function_name(node) == "getattr" and node.args[1] in ("dtype", "device"):
            return ""  # it says nothing of numbers
        if not all(source in self._constant or source in self._not_evaluated for source in inputs):
            return ""
        for source in inputs:
            if source in self._not_evaluated:
                return self._not_evaluated[source]
        name = function_name(node) or node.target
        return f"the constant is computed by {name}, which folding does not evaluate"

    def value(self, node: Node) -> Tensor | None:
        """Return the float64 value of a constant, or None if `node` is none or has no value."""
        value = self._computed(node)
        return value if value is not None and value.is_floating_point() else None

    def _computed(self, node: Node) -> Tensor | None:
        """Return the value of a constant: float64, or the integers of an index."""
        if node not in self._constant:
            return None
        if node not in self._values:
            self._values[node] = self._evaluate(node)
        return self._values[node]

    def _evaluate(self, node: Node) -> Tensor | None:
        if node.op == "get_attr":
            return self._attribute(node)
        values = {source: self._computed(source) for source in computed_from(node)}
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
        held = self._held(node)
        if held is None or held.is_meta:
            return None
        return held.detach().double() if held.is_floating_point() else held.detach()

    def _held(self, node: Node) -> Tensor | None:
        held = self._captured.region_of(node).constants.get(str(node.target))
        if held is None:
            owner, _, attr = str(node.target).rpartition(".")
            held = getattr(self._captured.module(owner), attr, None)
        return held if isinstance(held, Tensor) else None

    def _reads(self, node: Node) -> set[Node]:
        if node.op == "get_attr":
            return {node}
        return {read for source in computed_from(node) for read in self._reads(source)}

    def roots(self, node: Node) -> set[str]:
        """Return the names of the parameters and buffers that a constant is made of."""
        return {str(read.target) for read in self._reads(node)}


class Constants(_Evaluated):
    """What the calls of a captured model do with such values."""

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
        call = call_of(self._captured, node)
        if not constants or not others:
            return self._computed_otherwise(call, others)
        if named(node, *_FUSED):
            return self._fused(node, constants, others)
        if calls_layer(self._captured, node) or (call and call.operation.traits & _NO_COMBINATION):
            return None
        if len(constants) > 1 or len(others) > 1:
            return self._of_several(node, constants, others)
        value = self.value(constants[0])
        shape = self._captured.shape(constants[0]) if value is None else value.shape
        if _is_arithmetic(call) and self._widens(others[0], shape):
            return None  # one channel becomes many, as angles from a position: no map of channels
        if value is None:
            return None if call is None else self._without_value(call, constants[0])
        return self._of_one(node, call, constants[0], others[0], value)

    def _of_one(
        self, node: Node, call: Call | None, constant: Node, operand: Node, value: Tensor
    ) -> ChannelConstant | Declined | None:
        """Return how a call combines one value and one constant."""
        axes = _long_axes(value)
        if len(axes) != 1:
            return _of_shape(value) if _is_arithmetic(call) else None
        if call is None:
            return _unknown(node)
        axis = axes[0] - value.dim()
        affine = self._affine(call, constant, value.flatten())
        if call.name == "einsum" and (found := diagonal_axis(node, operand, value, axes[0])):
            axis, affine = found, Affine(value.flatten(), torch.zeros_like(value.flatten()))
        if isinstance(affine, Declined):
            return affine
        if (reason := self._unfit(call, operand, value, axis)) is not None:
            return Declined(reason, (node,))
        roots = self.roots(constant)
        root = next(iter(roots)) if len(roots) == 1 else None
        return ChannelConstant(node, operand, axis, affine, root)

    def _widens(self, operand: Node, shape: Size | None) -> bool:
        """Return whether a constant of this shape makes many channels of one."""
        axes = [axis for axis, size in enumerate(shape or ()) if size != 1]
        size = self._ranks.size(operand, axes[0] - len(shape or ())) if len(axes) == 1 else None
        return size == 1

    def _of_several(self, node: Node, constants: list[Node], others: list[Node]) -> Declined | None:
        """Return why a call of several values or constants is no map, if one is per channel."""
        values = [value for c in constants if (value := self.value(c)) is not None]
        counts = {len(_long_axes(value)) for value in values}
        if function_name(node) in ("addmm", "baddbmm") and max(counts, default=0) > 1:
            return None  # a linear layer: what is added is its bias
        if 1 not in counts:
            return None
        call = call_of(self._captured, node)
        if call is None:  # with a matrix it is a layer: what it gets per channel is its bias
            return None if max(counts) > 1 else _unknown(node)
        if call.name in _DOES:
            return Declined(_DOES[call.name], (node,))
        several = "two values with the constant" if len(others) > 1 else "several constants"
        return Declined(f"combines {several} in one call", (node,))

    def _computed_otherwise(self, call: Call | None, others: list[Node]) -> Declined | None:
        """Return why a product or a sum with tensors that have no known value is not folded."""
        made = [node for node in others if node in self._not_evaluated]
        if len(others) != 2 or len(made) != 1 or not _is_arithmetic(call):
            return None
        return Declined(self._not_evaluated[made[0]], ())

    def _without_value(self, call: Call, constant: Node) -> Declined | None:
        """Return why a product or a sum with a constant that has no float64 value stays."""
        if not _is_arithmetic(call):
            return None
        if self._computed(constant) is not None:
            return Declined("the constant is not of floating point", ())
        held = {str(read.target): self._held(read) for read in self._reads(constant)}
        empty = ", ".join(sorted(n for n, t in held.items() if t is not None and t.is_meta))
        # Else it is a part of a table, such as that of rotary embeddings, and not one a channel.
        return Declined(f"the constant has no value that is known ({empty})", ()) if empty else None

    def _fused(
        self, node: Node, constants: list[Node], others: list[Node]
    ) -> ChannelConstant | Declined | None:
        """Return what a product and a sum in one call do to each channel."""
        call = call_of(self._captured, node)
        values = {constant: self.value(constant) for constant in constants}
        if call is None or any(value is None for value in values.values()):
            return Declined("one of its constants has no value that is known", ())
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

    def _affine(self, call: Call, constant: Node, value: Tensor) -> Affine | Declined:
        """Return the map of a call, or what it does instead."""
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if (terms := call.terms()) is not None and len(call.node.args) < 3:
            (first, a), (second, b) = terms
            scale, weight = (a, b) if second is constant else (b, a)
            if constant in (first, second):
                return Affine(one * scale, value * weight)
        if call.name == "mul":
            return Affine(value, zero)
        if call.name == "div":
            if call.get("rounding_mode") is not None:
                return Declined("rounds its quotient", (call.node,))
            if call.operand is constant:
                return Declined("divides a constant by the value", (call.node,))
            return Affine(value.reciprocal(), zero)
        if Trait.CONTRACTS in call.operation.traits:
            return Declined("is a product of matrices, or sums over an axis", (call.node,))
        does = _DOES.get(call.name, "neither multiplies by the constant nor adds it")
        return Declined(does, (call.node,))

    def _unfit(self, call: Call, operand: Node, value: Tensor, axis: int) -> str | None:
        """Return why a value is more than one channel for each number, or is written into."""
        size, rank = self._ranks.size(operand, axis), self._ranks.rank(operand)
        if size is not None and size != value.numel():
            return f"it has {value.numel()} numbers for {size} channels"
        if rank is not None and rank < value.dim():
            return f"it gives a value of {rank} axes {value.dim()}"
        if not changes_in_place(self._captured, call.node):
            if rank is None and value.dim() > 1 and operand.op != "placeholder":
                return (
                    f"the number of axes of {operand.name} is unknown without example inputs: a "
                    f"constant of {value.dim()} axes may give it more (pass example_inputs)"
                )
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


def _is_arithmetic(call: Call | None) -> bool:
    return call is not None and bool(call.terms() is not None or call.name in ("mul", "div"))


def _long_axes(value: Tensor) -> list[int]:
    return [axis for axis in range(value.dim()) if value.shape[axis] > 1]


def _unknown(node: Node) -> Declined:
    name = function_name(node) or node.target
    return Declined(f"{name} is not an operation that folding knows", (node,))


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
