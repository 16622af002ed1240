"""What one operation demands of the values around it when one of them changes by an affine map.

    v = s.v' + t  for a value v; then for an operation that does nothing but

    pass on      y = x                           y and x change alike
    average      y = sum_k a_k x_k, sum a_k = 1  alike; where sum a_k != 1: only by s
    add          y = x + z                       s: all three; t: y and one of x, z
    multiply     y = x * z                       s: y and one of x, z
    rectify      y = max(x, a.x)                 s > 0: alike; t: never
    maximum      y = max_k x_k                   s > 0 and any t: alike
    join         y = [x, z]                      each its own part

`PropagationRules.around` returns the lane of every value that has to change with a given one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from rewrite.affine.channel_axis import Channels
from rewrite.affine.channel_map import ChannelMap, Refused
from rewrite.affine.slices import Parts
from rewrite.graph.arguments import argument
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import function_name, is_getitem

_PASS_ON = frozenset(
    {
        "contiguous", "to", "float", "half", "double", "bfloat16", "type", "type_as", "clone",
        "detach", "identity", "requires_grad",
    }
)  # fmt: skip


_DROPOUT = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "featurealphadropout",
     "alpha_dropout", "feature_alpha_dropout", "stochastic_depth"}
)  # fmt: skip


_RECTIFY = frozenset({"relu", "leaky_relu", "leakyrelu", "prelu"})


_SUMMING_TO_ONE = frozenset(
    {"interpolate", "upsample", "upsamplingbilinear2d", "upsamplingnearest2d"}
)


_SHAPE_METHODS = frozenset(
    {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "get_device",
     "is_floating_point", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
)  # fmt: skip


_SHAPE_FUNCTIONS = frozenset(
    {"getattr", "zeros_like", "ones_like", "empty_like", "len", "is_tensor"}
)


_LIKE_SECOND = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})


@dataclass
class Constraints:
    """What a growth has to know of the numbers, and the ways it may still try.

    Attributes:
        positive: every scale is known to be positive.
        choose: called with the number of ways at a fork, returns the one to take.
        relied_on_sign: set when a step held only because the scales are positive.
    """

    positive: bool
    choose: Callable[[int], int]
    relied_on_sign: bool = False


class PropagationRules:
    """The operations of one captured model, as demands on lanes.

    `folded` are nodes (norms, multiplications by a constant) whose map has moved elsewhere, and the
    input that they pass on.
    """

    def __init__(self, captured: Captured, ranks: Ranks, folded: dict[Node, Node]) -> None:
        self._captured = captured
        self._ranks = ranks
        self._folded = folded
        self.channels = Channels(captured, ranks)
        self.parts = Parts(ranks)

    def reads_only_shape(self, node: Node, value: Node) -> bool:
        """Return whether `node` asks `value` for its shape, dtype or device and nothing else."""
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
        name = function_name(node) or ""
        if node.op == "call_method" and str(node.target) in _SHAPE_METHODS:
            return True
        if name in _SHAPE_FUNCTIONS:
            return True
        return (
            name in _LIKE_SECOND
            and len(node.args) > 1
            and (node.args[1] is value and node.args[0] is not value)
        )

    def around(
        self, node: Node, value: Node, lane: ChannelMap, demand: Constraints
    ) -> dict[Node, ChannelMap]:
        """Return the lanes that `node` demands of its inputs and value, given one of them.

        Raises:
            Refused: no map of the other values makes up for the change.
        """
        backward = value is node
        if node in self._folded:
            return {self._folded[node] if backward else node: lane}
        joined = self.parts.join(node)
        if joined is not None:
            return self._join(node, value, lane, *joined)
        if function_name(node) in ("chunk", "split", "tensor_split") and not backward:
            return self._parts(node, lane)
        if is_getitem(node):
            part = self.parts.part(node, lane, backward)
            source = node.args[0]
            assert isinstance(source, Node)
            whole = source
            if function_name(source) in ("chunk", "split", "tensor_split"):
                whole = source.args[0]  # type: ignore[assignment]
            if part is not None:
                return {whole if backward else node: part}
        followed = self.channels.follow(node, lane, backward)
        if followed is not None:
            return {_first(node) if backward else node: followed}
        return self._compute(node, value, lane, demand)

    # -- what computes ------------------------------------------------------------------------

    def _compute(
        self, node: Node, value: Node, lane: ChannelMap, demand: Constraints
    ) -> dict[Node, ChannelMap]:
        name = self._name(node)
        backward = value is node
        if name in ("add", "iadd", "sub", "isub"):
            return self._add(node, value, lane, demand)
        if name in ("mul", "imul"):
            return self._multiply(node, value, lane, demand)
        if name in ("div", "truediv", "itruediv"):
            self._only_scale(node, lane, "divides")
            if not isinstance(node.args[1], Node) or value is not node.args[1]:
                return _unary(node, backward, lane)
        if name in ("mean", "sum"):
            return self._reduce(node, name, lane, backward)
        if name in _RECTIFY:
            self._only_scale(node, lane, "bends at zero")
            self._needs_sign(node, lane, demand)
            return _unary(node, backward, lane)
        if "max" in name and "pool" in name:
            self._needs_sign(node, lane, demand)
            return _unary(node, backward, lane)
        if self._commutes(node, name, lane):
            return _unary(node, backward, lane)
        raise Refused(f"{self.called(node)} does not commute with a map per channel")

    def _commutes(self, node: Node, name: str, lane: ChannelMap) -> bool:
        if name in _PASS_ON or name in _SUMMING_TO_ONE or name.startswith("adaptive"):
            return True
        if name == "neg":
            self._only_scale(node, lane, "negates")
            return True
        if name in _DROPOUT:
            if self._drops(node):
                self._only_scale(node, lane, "drops values of (training mode)")
            return True
        if "avg" in name and "pool" in name:
            if reason := self._counts_padding(node):
                self._only_scale(node, lane, reason)
            return True
        if name == "roll":
            dims = argument(node, 2, "dims")
            dims = (dims,) if isinstance(dims, int) else dims
            first = _first(node)
            return (
                isinstance(dims, list | tuple)
                and lane.axis < 0
                and all(
                    isinstance(d, int)
                    and -self._length(first) <= d
                    and self._ranks.from_end(first, d) not in (lane.axis, d if d >= 0 else None)
                    for d in dims
                )
            )
        if name == "pad" or name.endswith(("pad1d", "pad2d", "pad3d")):
            return self._pads(node, name, lane)
        return False

    def _length(self, node: Node) -> int:
        return self._ranks.rank(node) or 0

    def _only_scale(self, node: Node, lane: ChannelMap, does: str) -> None:
        if lane.shift:
            raise Refused(f"{self.called(node)} {does}: a shift does not pass through it")

    def _needs_sign(self, node: Node, lane: ChannelMap, demand: Constraints) -> None:
        if lane.scale:
            if not demand.positive:
                raise Refused(f"{self.called(node)} passes only positive scales, and some are not")
            demand.relied_on_sign = True

    def _drops(self, node: Node) -> bool:
        if node.op == "call_module":
            module = self._captured.module(str(node.target))
            return module.training and getattr(module, "p", 0.0) > 0
        last = 3 if function_name(node) == "stochastic_depth" else 2
        training = argument(node, last, "training", True)
        return bool(training) and argument(node, 1, "p", 0.5) != 0

    def _counts_padding(self, node: Node) -> str:
        """Return how an average pool weighs something that is not its input, or ""."""
        if node.op == "call_module":
            module: Any = self._captured.module(str(node.target))
            padding, counted = module.padding, module.count_include_pad
            divisor = getattr(module, "divisor_override", None)
        else:
            padding = argument(node, 3, "padding", 0)
            counted = argument(node, 5, "count_include_pad", True)
            divisor = argument(node, 6, "divisor_override")
        pads = any(padding) if isinstance(padding, list | tuple) else padding != 0
        if divisor is not None:
            return "divides by another number than that of its inputs"
        return "averages over zeros of its padding" if pads and counted else ""

    def _pads(self, node: Node, name: str, lane: ChannelMap) -> bool:
        if node.op == "call_module":
            module: Any = self._captured.module(str(node.target))
            sizes, zeros = module.padding, name.startswith(("zeropad", "constantpad"))
            fill = getattr(module, "value", 0)
        else:
            sizes, zeros = (
                argument(node, 1, "pad"),
                argument(node, 2, "mode", "constant") == "constant",
            )
            fill = argument(node, 3, "value", 0)
        if not isinstance(sizes, list | tuple):
            raise Refused(f"{self.called(node)} pads by computed sizes")
        axes = len(sizes) // 2
        own = sizes[2 * (-lane.axis - 1) : 2 * -lane.axis] if -lane.axis <= axes else ()
        if lane.axis >= 0 or any(own):
            raise Refused(f"{self.called(node)} pads the channels themselves")
        if zeros and any(size != 0 for size in sizes):
            if fill not in (0, None):
                raise Refused(f"{self.called(node)} pads with a constant")
            self._only_scale(node, lane, "pads with zeros")
        return True

    def _reduce(
        self, node: Node, name: str, lane: ChannelMap, backward: bool
    ) -> dict[Node, ChannelMap]:
        source = _first(node)
        dims = argument(node, 1, "dim")
        dims = (dims,) if isinstance(dims, int) else dims
        keep = bool(argument(node, 2, "keepdim", False))
        rank = self._ranks.rank(source)
        if rank is None or not isinstance(dims, list | tuple):
            raise Refused(
                f"which axes {self.called(node)} reduces is unknown (pass example_inputs)"
            )
        if name == "sum":
            self._only_scale(node, lane, "sums")
        gone = {dim % rank for dim in dims}
        kept = [axis for axis in range(rank) if keep or axis not in gone]
        axis = kept[lane.axis % len(kept)] if backward else lane.axis % rank
        if axis in gone:
            raise Refused(f"{self.called(node)} reduces over the channels")
        moved = lane.moved(axis - rank) if backward else lane.moved(kept.index(axis) - len(kept))
        return {source if backward else node: moved}

    # -- two operands -------------------------------------------------------------------------

    def _operands(self, node: Node, lane: ChannelMap) -> tuple[Any, Any]:
        one = node.args[0] if node.args else node.kwargs.get("input")
        other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
        if one is other:
            raise Refused(f"{self.called(node)} combines a value with itself")
        if isinstance(one, Node) and isinstance(other, Node) and lane.axis >= 0:
            raise Refused(
                f"the number of axes of {node.name} is unknown without example inputs "
                "(pass example_inputs)"
            )
        return one, other

    def _is_constant(self, value: Any) -> bool:
        return not isinstance(value, Node) or value.op == "get_attr"

    def _fits(self, node: Node, value: Any, lane: ChannelMap) -> None:
        """Refuse a value that is broadcast along the channels."""
        if isinstance(value, Node):
            size = self._ranks.size(value, lane.axis)
            if size is not None and size != len(lane.index):
                raise Refused(f"{self.called(node)} broadcasts {value.name} over the channels")

    def _add(
        self, node: Node, value: Node, lane: ChannelMap, demand: Constraints
    ) -> dict[Node, ChannelMap]:
        one, other = self._operands(node, lane)
        name = self._name(node)
        if argument(node, 2, "alpha", 1) != 1:
            raise Refused(f"{self.called(node)} weighs its second operand")
        subtracts = name in ("sub", "isub")
        if subtracts and value is other and lane.shift:
            raise Refused(f"{self.called(node)} subtracts, and a shift would change its sign")
        demands: dict[Node, ChannelMap] = {node: lane}
        operands = [v for v in (one, other) if not self._is_constant(v)]
        if lane.scale and len(operands) < 2:
            constant = other if operands and operands[0] is one else one
            if isinstance(constant, Node) or constant != 0:
                raise Refused(f"{self.called(node)} adds a constant, which would have to be scaled")
        for operand in operands:
            self._fits(node, operand, lane)
        if value is node:
            takers = [one] if subtracts and one in operands else operands
            taker = takers[demand.choose(len(takers))] if lane.shift else None
        else:
            taker = value if lane.shift else None
        for operand in operands:
            demands[operand] = replace(lane, shift=lane.shift and operand is taker)
        return demands

    def _multiply(
        self, node: Node, value: Node, lane: ChannelMap, demand: Constraints
    ) -> dict[Node, ChannelMap]:
        one, other = self._operands(node, lane)
        self._only_scale(node, lane, "multiplies")
        operands = [v for v in (one, other) if not self._is_constant(v)]
        if not operands:
            raise Refused(f"{self.called(node)} multiplies constants")
        taker = operands[demand.choose(len(operands))] if value is node else value
        self._fits(node, taker, lane)
        return {node: lane, taker: lane}

    # -- joining and parting ------------------------------------------------------------------

    def _join(
        self, node: Node, value: Node, lane: ChannelMap, parts: list[Node], axis: int
    ) -> dict[Node, ChannelMap]:
        if (axis < 0) != (lane.axis < 0):
            raise Refused(
                f"the number of axes of {node.name} is unknown without example inputs "
                "(pass example_inputs)"
            )
        if axis != lane.axis:
            return {node: lane, **dict.fromkeys(parts, lane)}
        sizes = [self._ranks.size(part, axis) for part in parts]
        if None in sizes:
            unknown = parts[sizes.index(None)]
            raise Refused(
                f"the number of channels of {unknown.name}, a part of {node.name}, is unknown "
                "without example inputs (pass example_inputs)"
            )
        demands: dict[Node, ChannelMap] = {}
        if value is not node:
            pieces = [
                lane.index if part is value else lane.index.new_full((size or 0,), -1)
                for part, size in zip(parts, sizes, strict=True)
            ]
            whole = lane.moved(axis, torch.cat(pieces))
        else:
            whole = lane
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            assert size is not None
            piece = whole.moved(axis, whole.index[start : start + size])
            if part in demands and not demands[part].same(piece):
                raise Refused(f"{node.name} holds {part.name} twice")
            demands[part] = piece
            start += size
        if start != len(whole.index):
            raise Refused(f"{node.name} has {start} channels where {len(whole.index)} are mapped")
        return {node: whole, **demands}

    def _parts(self, node: Node, lane: ChannelMap) -> dict[Node, ChannelMap]:
        demands: dict[Node, ChannelMap] = {}
        for user in node.users:
            part = self.parts.part(user, lane, False)
            if part is None:
                raise Refused(f"{self.called(user)} reads all parts of {node.name}")
            demands[user] = part
        return demands

    # -- names --------------------------------------------------------------------------------

    def _name(self, node: Node) -> str:
        """Return the plain name of what `node` computes, as a function's, in lower case."""
        if node.op != "call_module":
            return function_name(node) or node.op
        kind = type(self._captured.module(str(node.target)))
        if not kind.__module__.startswith("torch.nn.modules."):
            return kind.__name__
        name = kind.__name__.lower()
        return name.replace("maxpool", "max_pool").replace("avgpool", "avg_pool")

    def called(self, node: Node) -> str:
        """Return a call in words: "act1 (ReLU)", "add in layer1.0"."""
        if node.op == "call_module":
            return f"{node.target} ({type(self._captured.module(str(node.target))).__name__})"
        if node.op in ("placeholder", "output", "get_attr"):
            return f"the {node.op} {node.name}"
        owner = self._captured.owner(node)
        name = function_name(node) or str(node.target)
        return f"{name} in {owner}" if owner else name


def _first(node: Node) -> Node:
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, Node):
        raise Refused(f"{node.name} reads no value")
    return source


def _unary(node: Node, backward: bool, lane: ChannelMap) -> dict[Node, ChannelMap]:
    return {_first(node) if backward else node: lane}
