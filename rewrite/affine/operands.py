"""What a sum and a product of two values demand when one of them changes by an affine map.

    y = a x + b z      s: all three;  t: y and x where a = 1, or y and z where b = 1
    y = x * z          s: y and one of x, z
    y = x / z          s: y and x

A number or a parameter takes no part: then y = c x passes s, y = x + c passes t, and y = c - x
would turn the sign of t.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

from torch.fx import Node

from rewrite.affine.channel_map import UNKNOWN_RANK, ChannelMap, DeclinedError
from rewrite.affine.laws import Constraints, called
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.traits import Call, Trait


class OperandRules:
    """The sums and products of one captured model."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._captured = captured
        self._ranks = ranks

    def around(
        self, call: Call, value: Node, channel_map: ChannelMap, constraints: Constraints
    ) -> dict[Node, ChannelMap]:
        """Return the maps that a sum, product or quotient demands of its operands and value.

        Raises:
            DeclinedError: no map of the other values makes up for the change.
        """
        one, other = call.operand, call.get("other")
        if one is other:
            self._decline(call, "combines a value with itself")
        if isinstance(one, Node) and isinstance(other, Node) and channel_map.axis >= 0:
            raise DeclinedError(UNKNOWN_RANK.format(call.node.name), call.node)
        if value is not call.node and value is not one and value is not other:
            self._decline(call, f"reads {value.name} as something else than an operand")
        if Trait.ADDS in call.operation.traits:
            return self._add(call, value, channel_map, constraints)
        if channel_map.shift:
            does = "multiplies" if call.name == "mul" else "divides"
            self._decline(call, f"{does}: a shift does not pass through it")
        if call.name == "mul":
            return self._multiply(call, (one, other), value, channel_map, constraints)
        return self._divide(call, (one, other), value, channel_map)

    def _decline(self, call: Call, why: str) -> NoReturn:
        raise DeclinedError(f"{called(self._captured, call.node)} {why}", call.node)

    def _fits(self, call: Call, value: Any, channel_map: ChannelMap) -> None:
        """Decline a value that is broadcast along the channels."""
        if isinstance(value, Node):
            size = self._ranks.size(value, channel_map.axis)
            if size is not None and size != len(channel_map.index):
                self._decline(call, f"broadcasts {value.name} over the channels")

    def _add(
        self, call: Call, value: Node, channel_map: ChannelMap, constraints: Constraints
    ) -> dict[Node, ChannelMap]:
        terms = call.terms()
        if terms is None or len(call.node.args) > 2:
            raise DeclinedError(
                f"{called(self._captured, call.node)} weighs its operands by a computed number",
                call.node,
            )
        weights = {term: weight for term, weight in terms if not is_constant(term)}
        constants = [term for term, _ in terms if is_constant(term)]
        if channel_map.scale and any(isinstance(c, Node) or c != 0 for c in constants):
            self._decline(call, "adds a constant, which would have to be scaled")
        for operand in weights:
            self._fits(call, operand, channel_map)
        absorbing = self._absorbing(call, value, channel_map, weights, constraints)
        return {
            call.node: channel_map,
            **{term: replace(channel_map, shift=term is absorbing) for term in weights},
        }

    def _absorbing(
        self,
        call: Call,
        value: Node,
        channel_map: ChannelMap,
        weights: dict[Node, Any],
        constraints: Constraints,
    ) -> Node | None:
        """Return the operand whose shift is that of the sum, None where there is no shift."""
        if not channel_map.shift:
            return None
        alone = [term for term, weight in weights.items() if weight == 1]
        if value is call.node and alone:
            return alone[constraints.choose(len(alone))]
        if value in alone:
            return value
        if any(weight == -1 for weight in weights.values()):
            self._decline(call, "subtracts, and a shift would change its sign")
        raise DeclinedError(
            f"{called(self._captured, call.node)} weighs its operands, and a shift would "
            "have to be weighed too",
            call.node,
        )

    def _multiply(
        self,
        call: Call,
        factors: tuple[Any, Any],
        value: Node,
        channel_map: ChannelMap,
        constraints: Constraints,
    ) -> dict[Node, ChannelMap]:
        operands = [factor for factor in factors if not is_constant(factor)]
        if not operands:
            self._decline(call, "multiplies constants")
        chosen = operands[constraints.choose(len(operands))] if value is call.node else value
        self._fits(call, chosen, channel_map)
        return {call.node: channel_map, chosen: channel_map}

    def _divide(
        self, call: Call, operands: tuple[Any, Any], value: Node, channel_map: ChannelMap
    ) -> dict[Node, ChannelMap]:
        dividend = operands[0]
        if call.get("rounding_mode") is not None:
            self._decline(call, "rounds its quotient")
        if is_constant(dividend) or (value is not call.node and value is not dividend):
            self._decline(call, "divides by the value")
        self._fits(call, dividend, channel_map)
        return {call.node: channel_map, dividend: channel_map}


def is_constant(value: Any) -> bool:
    """Return whether an operand is a number or a tensor of the model."""
    return not isinstance(value, Node) or value.op == "get_attr"
