"""Which map of its operand an operation hands to its value unchanged.

    y = f(x):    f(s.x + t) = s.f(x) + t    for the scales and shifts that the map has

The equations of each operation stand in `rewrite.graph.traits`; here is what they hold under: an
average whose weights sum to one (no zeros of a padding, no other divisor), a cast to floating
point, a dropout that drops nothing, a window that does not reach over the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.graph.captured import Captured
from rewrite.graph.operators import conv_of, linear_of, norm_of
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import function_name
from rewrite.graph.traits import SPATIAL, Call, Shape, Trait, call_of, has, named

_WORDS = {
    "neg": "negates", "sum": "sums", "mul": "multiplies", "div": "divides",
    "relu": "bends at zero", "leaky_relu": "bends at zero", "prelu": "bends at zero",
    "rrelu": "bends at zero", "abs": "bends at zero",
}  # fmt: skip


_FLOATING = ("float", "double", "half", "bfloat16")


@dataclass
class Constraints:
    """What a propagation has to know of the numbers, and the alternatives it may still try.

    Attributes:
        positive: every scale is known to be positive.
        choose: called with the number of alternatives, returns the one to take.
        relied_on_sign: set when a step held only because the scales are positive.
        relied_on_size: the steps that hold for inputs of the size of the examples, in words.
    """

    positive: bool
    choose: Callable[[int], int]
    relied_on_sign: bool = False
    relied_on_size: dict[str, None] = field(default_factory=dict)


class UnaryLaws:
    """The operations of one captured model that compute their value from one operand."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._captured = captured
        self._ranks = ranks

    def around(
        self, call: Call, value: Node, channel_map: ChannelMap, constraints: Constraints
    ) -> dict[Node, ChannelMap]:
        """Return the map of the operand, given that of the value; or the other way round.

        Raises:
            DeclinedError: the operation hands on no such map.
        """
        node = call.node
        operand = operand_of(call)
        if value is not node and value is not operand:
            raise DeclinedError(
                f"{called(self._captured, node)} reads {value.name} beside its first operand", node
            )
        if _occurrences(node, operand) > 1:
            raise DeclinedError(f"{called(self._captured, node)} reads a value twice", node)
        self._check(call, channel_map, constraints)
        if call.operation.shape is Shape.REDUCED:
            direction = Direction.BACKWARD if value is node else Direction.FORWARD
            return self._reduce(call, operand, channel_map, direction)
        return {operand if value is node else node: channel_map}

    def _check(self, call: Call, channel_map: ChannelMap, constraints: Constraints) -> None:
        traits = call.operation.traits
        if Trait.ROUNDS in traits:
            self._decline(call, "rounds its values")
        moves = Trait.MOVES | Trait.JOINS | Trait.SPLITS | Trait.ASKS
        if traits & moves or not traits & (Trait.SHIFTS | Trait.SCALES):
            self._decline(call, "does not commute with a map per channel")
        if Trait.CASTS in traits and (why := cast_refusal(self._captured, call)):
            self._decline(call, why)
        if _is_integer(call.node.kwargs.get("dtype")):
            self._decline(call, "casts to integers")
        if call.get("return_indices", False):
            self._decline(call, "returns the places of its values, too")
        self._keeps_channels_apart(call, channel_map)
        if Trait.SHIFTS not in traits:
            self._only_scale(
                call, channel_map, _WORDS.get(call.name, "does not keep what is added")
            )
        elif Trait.DROPS in traits:
            self._drops(call, channel_map)
        elif call.name.startswith("avg_pool"):
            self._averages(call, channel_map)
        elif call.name in ("pad", "constant_pad_nd"):
            self._pads(call, channel_map, constraints)
        if channel_map.scale and Trait.SCALES not in traits:
            if not constraints.positive:
                self._decline(call, "passes only positive scales, and some are not")
            constraints.relied_on_sign = True

    def _decline(self, call: Call, why: str) -> NoReturn:
        raise DeclinedError(f"{called(self._captured, call.node)} {why}", call.node)

    def _only_scale(self, call: Call, channel_map: ChannelMap, does: str) -> None:
        if channel_map.shift:
            self._decline(call, f"{does}: a shift does not pass through it")

    def _keeps_channels_apart(self, call: Call, channel_map: ChannelMap) -> None:
        """Decline a window that reaches over the channels."""
        mixes = call.operation.mixes
        if mixes == 0:
            return
        rank = self._ranks.rank(operand_of(call))
        if channel_map.axis >= 0 or (rank is None and mixes == SPATIAL):
            self._decline(
                call, "takes a value whose number of axes is unknown (pass example_inputs)"
            )
        first = 2 - rank if mixes == SPATIAL and rank is not None else -mixes
        if channel_map.axis >= first:
            self._decline(call, "reads neighbouring channels together")

    # -- conditions ---------------------------------------------------------------------------

    def _drops(self, call: Call, channel_map: ChannelMap) -> None:
        if not drops(call):
            return
        if call.name == "alpha_dropout":
            self._decline(call, "puts other values in the place of some (training mode)")
        self._only_scale(call, channel_map, "drops values of (training mode)")

    def _averages(self, call: Call, channel_map: ChannelMap) -> None:
        """Decline a shift where an average weighs something that is not its input."""
        padding = call.get("padding", 0)
        pads = any(padding) if isinstance(padding, list | tuple) else padding != 0
        if call.get("divisor_override") is not None:
            self._only_scale(call, channel_map, "divides by another number than that of its inputs")
        if pads and call.get("count_include_pad", True):
            self._only_scale(call, channel_map, "averages over zeros of its padding")

    def _pads(self, call: Call, channel_map: ChannelMap, constraints: Constraints) -> None:
        """Decline a shift that would have to reach what a padding adds, and any pad of channels.

        Amounts that are computed of the size of the input are those of the example inputs.
        """
        given = call.get("pad")
        kind = type(call.module).__name__ if call.module is not None else ""
        zeros = call.name == "constant_pad_nd" or (
            kind.startswith(("ZeroPad", "ConstantPad"))
            if kind
            else call.get("mode", "constant") == "constant"
        )
        sizes = _known_sizes(given)
        if sizes is None:
            self._decline(call, "pads by computed sizes")
        place = -channel_map.axis
        own = slice(2 * (place - 1), 2 * place) if place <= len(sizes) // 2 else slice(0)
        if channel_map.axis >= 0 or any(size != 0 for size in given[own]):
            self._decline(call, "pads the channels themselves")
        if zeros and any(size > 0 for size in sizes):
            if call.get("value", 0) not in (0, None):
                self._decline(call, "pads with a constant")
            self._only_scale(call, channel_map, "pads with zeros")
        elif zeros and channel_map.shift and sizes != list(given):
            source = self._captured.source(call.node) or ""
            words = f"{called(self._captured, call.node)} ({source.rpartition('/')[2]})"
            constraints.relied_on_size[words] = None

    def _reduce(
        self, call: Call, source: Node, channel_map: ChannelMap, direction: Direction
    ) -> dict[Node, ChannelMap]:
        dims = call.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        keep = bool(call.get("keepdim", False))
        rank = self._ranks.rank(source)
        if rank is None or not isinstance(dims, list | tuple) or not dims:
            raise DeclinedError(
                f"which axes {called(self._captured, call.node)} reduces is unknown "
                "(pass example_inputs)",
                call.node,
            )
        gone = {dim % rank for dim in dims}
        kept = [axis for axis in range(rank) if keep or axis not in gone]
        backward = direction is Direction.BACKWARD
        axis = kept[channel_map.axis % len(kept)] if backward else channel_map.axis % rank
        if axis in gone:
            self._decline(call, "reduces over the channels")
        if backward:
            return {source: channel_map.moved(axis - rank)}
        return {call.node: channel_map.moved(kept.index(axis) - len(kept))}


def operand_of(call: Call) -> Node:
    """Return the first operand of a call.

    Raises:
        DeclinedError: it is a number or a list of values, or there is none.
    """
    operand = call.operand
    if isinstance(operand, list | tuple):
        raise DeclinedError(f"{call.node.name} takes a list of values at once", call.node)
    if not isinstance(operand, Node):
        raise DeclinedError(f"{call.node.name} reads no value first", call.node)
    return operand


def drops(call: Call) -> bool:
    """Return whether a dropout drops anything, as it is called."""
    if call.module is not None:
        return bool(call.module.training and call.get("p", 0.0) > 0)
    return bool(call.get("training", True)) and call.get("p", 0.5) != 0


def computed_from(node: Node) -> list[Node]:
    """Return what a call computes its numbers from; a cast asks a second tensor for its dtype."""
    inputs = node.all_input_nodes
    return inputs[:1] if has(node, Trait.CASTS) else inputs


def cast_refusal(captured: Captured, call: Call) -> str | None:
    """Return why a cast may leave something that is not of floating point, or None."""
    if call.name in _FLOATING:
        return None
    for given in (*call.node.args[1:], *call.node.kwargs.values()):
        if isinstance(given, Node):
            floating = _gives_floating(captured, given)
            if floating is None:
                return "casts to a dtype that is unknown (pass example_inputs)"
        elif call.name == "type" and not isinstance(given, torch.dtype):
            floating = any(f"{kind}Tensor" in str(given) for kind in ("Float", "Double"))
        else:
            floating = not _is_integer(given)
        if not floating:
            return "casts to a dtype that is not of floating point"
    return None


def _gives_floating(captured: Captured, given: Node) -> bool | None:
    """Return whether the dtype that an argument stands for is floating; None if unknown."""
    if named(given, "getattr"):
        source, attribute = given.args
        if attribute == "device":
            return True
        return _is_floating(captured, source) if attribute == "dtype" else None
    return _is_floating(captured, given)


def _is_floating(captured: Captured, value: Any) -> bool | None:
    """Return whether a value is of floating point, None if nothing tells."""
    while isinstance(value, Node):
        held = value.meta.get("val")
        if isinstance(held, torch.Tensor):
            return held.is_floating_point()
        if (ref := captured.ref(value)) is not None:
            held = getattr(captured.module(ref.owner), ref.attr, None)
            return held.is_floating_point() if isinstance(held, torch.Tensor) else None
        read = (user for user in value.users if user.all_input_nodes[:1] == [value])
        if any(calls_layer(captured, node) for node in (value, *read)):
            return True
        call = call_of(captured, value)
        if call is None or call.operation.traits & (Trait.CASTS | Trait.ROUNDS | Trait.ASKS):
            return None
        value = call.operand
    return None


def calls_layer(captured: Captured, node: Node) -> bool:
    """Return whether `node` calls a convolution, a linear layer or a norm."""
    if conv_of(captured, node) is not None or linear_of(captured, node) is not None:
        return True
    return norm_of(captured, node) is not None


def _known_sizes(given: Any) -> list[int] | None:
    """Return the amounts of a padding, those of the example inputs where they are computed."""
    if not isinstance(given, list | tuple):
        return None
    known = [size.meta.get("val") if isinstance(size, Node) else size for size in given]
    sizes = [size for size in known if isinstance(size, int)]
    return sizes if len(sizes) == len(known) else None


def called(captured: Captured, node: Node) -> str:
    """Return a call in words: "act1 (ReLU)", "add in layer1.0"."""
    if node.op == "call_module":
        return f"{node.target} ({type(captured.module(str(node.target))).__name__})"
    if node.op in ("placeholder", "output", "get_attr"):
        return f"the {node.op} {node.name}"
    owner = captured.owner(node)
    name = function_name(node) or str(node.target)
    return f"{name} in {owner}" if owner else name


def _occurrences(node: Node, operand: Node) -> int:
    seen: list[Node] = []
    map_arg((node.args, node.kwargs), seen.append)
    return sum(one is operand for one in seen)


def _is_integer(given: Any) -> bool:
    if isinstance(given, torch.dtype):
        return not given.is_floating_point
    return given is int or given is bool
