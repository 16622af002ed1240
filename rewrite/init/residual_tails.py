"""What makes a branch of a graph vanish: its tail, found by walking back from its end.

    f(x) = t(norm(h))        gamma = beta = 0    ->  f(x) = 0        t: anything with t(0) = 0
    f(x) = t(W h + b)        W = b = 0           ->  f(x) = 0
    f(x) = t(g(v) * h)       v = 0               ->  f(x) = 0        g: anything with g(0) = 0

A sum, a difference and a concatenation vanish if each of their parts does, an attention if its
values do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.fx import Node

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.operators import activation_of, conv_of, linear_of, norm_of
from rewrite.graph.spellings import function_name
from rewrite.graph.traits import Trait, call_of, has, named, operation
from rewrite.outcomes import Declined
from rewrite.weights.fans import linear_maps

TailKind = Literal["norm", "weight", "scale"]


# Applied with a weight that code computes, such as a standardized one.
_APPLIED = ("linear", "conv1d", "conv2d", "conv3d")


# Attention in one call, by its output projection's weight and bias: place and name.
_PROJECTED = {
    "shifted_window_attention": ((2, "proj_weight"), (10, "proj_bias")),
    "shifted_window_attention_3d": ((2, "proj_weight"), (10, "proj_bias")),
    "multi_head_attention_forward": ((11, "out_proj_weight"), (12, "out_proj_bias")),
}


# The place of the values among the inputs of a weighted sum.
_WEIGHTED_SUMS = {"matmul": 1, "bmm": 1, "scaled_dot_product_attention": 2}


_WEIGHT_NORMS = ("batch_norm", "instance_norm")


@dataclass(frozen=True)
class Tail:
    """The last thing of a branch that can make it vanish: its scale and its shift.

    A norm's gamma and beta, a layer's weight and bias, or a learned scale or shift alone.
    """

    kind: TailKind
    weight: TensorRef
    bias: TensorRef | None = None


@dataclass(frozen=True)
class TailFinder:
    """Walks back from the end of a branch.

    Attributes:
        captured: the model.
        constant: the nodes whose value depends on no input.
        leads: whether one node is computed from another.
    """

    captured: Captured
    constant: set[Node]
    leads: Callable[[Node, Node], bool]

    def tails(self, node: Node, inside: set[Node]) -> list[Tail] | Declined:
        """Return what makes the value of `node` zero; or say what is in the way."""
        learned: list[Tail] = []  # scales on the way, the last one first
        shifts: list[Tail] = []
        while node in inside:
            learned += self._written_later(node)
            if (end := self._end(node)) is not None:
                return [end, *shifts]
            data = [source for source in node.all_input_nodes if source not in self.constant]
            if is_sum(node) and len(data) == 1:
                if 0 not in node.args:  # `sum` of Python starts with 0 + x
                    shift = self._scale([s for s in node.all_input_nodes if s in self.constant])
                    if shift is None:
                        break
                    shifts.append(shift)
                node = data[0]
            elif has(node, Trait.ADDS) or has(node, Trait.JOINS):
                found = self._all_tails(data, inside)
                if isinstance(found, Declined) and not learned:
                    return found
                return [*(learned[:1] if isinstance(found, Declined) else found), *shifts]
            elif is_product(node) and data:
                if scale := self._scale([s for s in node.all_input_nodes if s in self.constant]):
                    learned.append(scale)
                # Of two factors, one may be a gate that is made from the other.
                gate = len(data) == 2 and self.leads(data[1], data[0])
                node = data[1] if gate else data[0]
            elif (row := operation(node)) is not None and row.name in _WEIGHTED_SUMS:
                node = data[_WEIGHTED_SUMS[row.name]]
            elif self._hands_on(node):
                node = node.all_input_nodes[0]
            else:
                break
        if learned:
            return [learned[0], *shifts]
        last = function_name(node) or node.target
        if node not in inside:
            return Declined(
                f"the branch holds its own input, {last}, which no weight switches off", (node,)
            )
        return Declined(f"the branch ends in {last}, which no weight switches off", (node,))

    def _all_tails(self, parts: list[Node], inside: set[Node]) -> list[Tail] | Declined:
        tails: list[Tail] = []
        for part in parts:
            found = self.tails(part, inside)
            if isinstance(found, Declined):
                return found
            tails += found
        return tails

    def _end(self, node: Node) -> Tail | None:
        if (norm := norm_of(self.captured, node)) is not None:
            return Tail("norm", norm.weight, norm.bias) if norm.weight is not None else None
        applied = conv_of(self.captured, node) or linear_of(self.captured, node)
        if applied is not None:
            return Tail("weight", applied.weight, applied.bias)
        if node.op != "call_module":
            return self._computed_end(node)
        name = str(node.target)
        module = self.captured.module(name)
        if isinstance(module, nn.MultiheadAttention):
            name, module = f"{name}.out_proj", module.out_proj
        return layer_tail(name, module)

    def _computed_end(self, node: Node) -> Tail | None:
        weight, bias = self.computed_weight(node), operand(node, 2, "bias")
        if places := _PROJECTED.get(function_name(node) or ""):
            given, bias = (operand(node, *place) for place in places)
            weight = self.switch(given) if isinstance(given, Node) else None
        shift = self.switch(bias) if isinstance(bias, Node) else None
        if weight is None or (bias is not None and shift is None):
            return None
        return Tail("weight", weight, shift)

    def computed_weight(self, node: Node) -> TensorRef | None:
        """Return what switches off a layer whose weight code computes, None for anything else."""
        weight = operand(node, 1, "weight") if named(node, *_APPLIED) else None
        return self.switch(weight) if isinstance(weight, Node) else None

    def switch(self, node: Node) -> TensorRef | None:
        """Return the parameter that makes a value zero which parameters alone make."""
        if node not in self.constant:
            return None
        if node.op == "get_attr":
            ref = self.captured.ref(node)
            learned = ref is not None and ref.attr in self.captured.module(ref.owner)._parameters
            return ref if learned else None
        inputs = node.all_input_nodes
        if is_product(node):
            found = [ref for source in inputs if (ref := self.switch(source)) is not None]
            return min(found, key=lambda ref: self.captured.tensor(ref).numel(), default=None)
        if named(node, *_WEIGHT_NORMS) and operand(node, 4, "bias") is None:
            gain = operand(node, 3, "weight")
            return self.switch(gain if isinstance(gain, Node) else inputs[0])
        return self.switch(inputs[0]) if inputs and hands_on(self.captured, node) else None

    def _scale(self, factors: list[Node]) -> Tail | None:
        found = [ref for factor in factors if (ref := self.switch(factor)) is not None]
        return Tail("scale", found[0]) if found else None

    def _written_later(self, node: Node) -> list[Tail]:
        """Return the learned scales that a line of its own multiplies in: `out.mul_(gain)`."""
        lines = [
            user
            for user in node.users
            if not user.users and str(user.target) == "mul_" and user.args[0] is node
        ]
        found = [self._scale(line.all_input_nodes[1:]) for line in reversed(lines)]
        return [scale for scale in found if scale is not None]

    def _hands_on(self, node: Node) -> bool:
        if not node.all_input_nodes:
            return False
        activation = activation_of(self.captured, node)
        if activation is not None:
            call = call_of(self.captured, node)
            return call is not None and Trait.ZERO in call.operation.traits
        if (norm := norm_of(self.captured, node)) is not None:
            return norm.bias is None
        if node.op == "call_module":
            module = self.captured.module(str(node.target))
            # A module without parameters that could not be traced: DropPath and its like.
            if type(module).__name__ in ("DropPath", "StochasticDepth"):
                return True
        return hands_on(self.captured, node)


def is_sum(node: Node) -> bool:
    """Return whether a line adds two values."""
    return named(node, "add")


def is_product(node: Node) -> bool:
    """Return whether a line multiplies two values."""
    return named(node, "mul")


def hands_on(captured: Captured, node: Node) -> bool:
    """Return whether a call hands on its first input, scaled, averaged or moved; f(0) = 0."""
    call = call_of(captured, node)
    return call is not None and call.operation.hands_on


def layer_tail(name: str, module: nn.Module) -> Tail | None:
    """Return the tail that a single layer of one dense map is."""
    if len(linear_maps(module)) != 1 or linear_maps(module)[0].parameter != "weight":
        return None
    bias = TensorRef(name, "bias") if getattr(module, "bias", None) is not None else None
    return Tail("weight", TensorRef(name, "weight"), bias)


def operand(node: Node, position: int, name: str) -> Any:
    """Return an argument of a function call by its position or its name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
