"""A map per channel, followed from a norm to the layers that read it.

    label[p] = the channel whose scale an element p of a value carries; -1: none

An operator that only moves elements moves their labels: it is run on them. At a layer the labels
have to be the same wherever it reads: then they say which input of the layer carries which channel.
A product with another value lets scales pass and no shifts. Anything else refuses, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.errors import one_line
from rewrite.observe.export import ObservedCall
from rewrite.observe.reductions import (
    REDUCES,
    Mixed,
    is_split_by_values,
    reduced,
    split_labels,
)
from rewrite.observe.spellings import (
    FORM,
    MOVES,
    SAME,
    SCALES,
    Contraction,
    argument,
    contraction_of,
    number,
    op_name,
    pads_nothing,
    shape_of,
)
from rewrite.observe.weight_axes import Operand, operands_of

_NO_LABEL = -1


class Unfollowed(Exception):  # noqa: N818 - a reason, caught where it is decided
    """Why a map cannot be followed any further."""


@dataclass(frozen=True, eq=False)
class Read:
    """One layer call that reads a mapped value.

    Attributes:
        node: the call.
        tensor: the name of the parameter that it multiplies by.
        operand: how it holds that parameter.
        axis: the axis of the parameter that meets the channels.
        channels: per place of that axis, the channel that it reads (-1: none).
        bias: the operand that it adds, if any, and the name of that parameter.
        bare: whether it adds nothing yet.
    """

    node: Node
    tensor: str
    operand: Operand
    axis: int
    channels: tuple[int, ...]
    bias: tuple[str, Operand] | None
    bare: bool
    no_shift: str = ""


@dataclass
class Flow:
    """Where the values of some norm calls go in one exported call.

    Attributes:
        labels: per value, the labels of its elements; a list where the value is one.
        reads: the layers that read them.
        returned: the paths under which the call returns them.
        no_shift: why a shift cannot follow, or "".
        of_size: the steps that hold for inputs of the size of the call, in words.
    """

    labels: dict[Node, Any] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    no_shift: str = ""
    of_size: dict[str, None] = field(default_factory=dict)


class Follower:
    """Follows maps through one exported call; knows which calls read which parameter."""

    def __init__(self, observed: ObservedCall) -> None:
        self.observed = observed
        self.readers: dict[str, list[tuple[Node, Operand]]] = {}
        self.operands: dict[tuple[Node, Node], tuple[str, Operand]] = {}
        for placeholder, name in observed.tensors.items():
            for reader, operand in operands_of(placeholder):
                self.readers.setdefault(name, []).append((reader, operand))
                self.operands[reader, operand.node] = (name, operand)

    def follow(self, sources: Mapping[Node, int], all_outputs: bool = False) -> Flow:
        """Return where the values of norm calls go, given how many channels each has.

        Args:
            sources: the calls, and their channels; the channels are the last axis.
            all_outputs: collect returned values instead of refusing them.

        Raises:
            Unfollowed: somebody reads a value and cannot take up its map.
        """
        flow = Flow()
        for node in self.observed.graph.nodes:
            if node in sources:
                flow.labels[node] = self._labels(node, sources[node])
                self._check_returned(flow, node, all_outputs)
            elif node.op == "call_function" and any(n in flow.labels for n in node.all_input_nodes):
                try:
                    self._visit(flow, node)
                except Unfollowed:
                    if not all_outputs:
                        raise
                self._check_returned(flow, node, all_outputs)
        return flow

    def _labels(self, node: Node, channels: int) -> Tensor:
        shape = shape_of(node)
        if shape is None or not shape or shape[-1] != channels:
            raise Unfollowed(f"the shape of {node.name} is not known")
        return torch.arange(channels, dtype=torch.int32).expand(shape)

    def _check_returned(self, flow: Flow, node: Node, collect: bool) -> None:
        if node not in flow.labels or node not in self.observed.outputs:
            return
        paths = [path.removeprefix("output.") for path in self.observed.outputs[node]]
        flow.returned += paths
        if not collect:
            raise Unfollowed(
                f"its output is what the model returns as {paths[0]} ({self.observed.call.name})"
            )

    def _visit(self, flow: Flow, node: Node) -> None:
        name = op_name(node)
        contraction = contraction_of(node, flow.labels)
        if name in FORM:
            return
        if name in SAME:
            self._same(flow, node, name)
        elif pads_nothing(node):
            flow.of_size[self.called(node)] = None
            self._same(flow, node, name)
        elif name == "getitem":
            held: Any = flow.labels[node.args[0]]  # type: ignore[index]
            index: Any = node.args[1]
            _set(flow, node, held[index] if isinstance(held, list | tuple) else held)
        elif is_split_by_values(node) or name in REDUCES:
            self._reduced(flow, node, name)
        elif name in MOVES:
            _set(flow, node, self.moved(flow.labels, node))
        elif contraction is not None:
            self._read(flow, node, contraction)
        elif name in SCALES or name in ("neg", "add", "sub", "where", "masked_fill"):
            self._scaled(flow, node, name)
        else:
            raise Unfollowed(f"its output is read by {self.called(node)}, which is no linear layer")

    def called(self, node: Node) -> str:
        """Return a call in words: its operator, its module, and its line."""
        stack = self.observed.stack(node)
        where = self.observed.owner(node) or "the model"
        return f"{op_name(node)} in {where}" + (f" ({stack[-1]})" if stack else "")

    def _same(self, flow: Flow, node: Node, name: str) -> None:
        if node.args[0] not in flow.labels:
            return  # only its type is read
        if name.endswith("dropout") and argument(node, 2, "train") is not False:
            raise Unfollowed(f"its output is read by a dropout that is active, {self.called(node)}")
        _set(flow, node, flow.labels[node.args[0]])  # type: ignore[index]

    def _reduced(self, flow: Flow, node: Node, name: str) -> None:
        held = flow.labels.get(node.args[0])  # type: ignore[arg-type]
        if not isinstance(held, Tensor):
            raise Unfollowed(f"its output is read by {self.called(node)}, which is no linear layer")
        try:
            if name in REDUCES:
                labels, shifts = reduced(node, held)
                if not shifts:
                    flow.no_shift = flow.no_shift or f"{self.called(node)} lets no shift pass"
                _set(flow, node, labels)
            else:
                axis, sizes = argument(node, 2, "dim", 0), argument(node, 1, "split_sizes")
                _set(flow, node, split_labels(held, axis, len(sizes)))
        except Mixed:
            raise Unfollowed(f"in {self.called(node)} its channels meet each other") from None

    # -- moving -------------------------------------------------------------------------------

    def moved(self, labels: Mapping[Node, Any], node: Node) -> Any:
        """Return the labels of what an operator of `MOVES` makes of labelled values.

        Raises:
            Unfollowed: it chooses among channels, or by values of the input.
        """
        name = op_name(node)
        if name in ("expand_as", "view_as", "reshape_as") and node.args[0] not in labels:
            return None
        indices = self._indices(labels, node, name)

        def given(argument_: Any) -> Any:
            if isinstance(argument_, list | tuple):
                return [given(item) for item in argument_]
            if not isinstance(argument_, Node):
                return argument_
            if argument_ in labels and argument_ not in indices:
                return labels[argument_]
            shape = shape_of(argument_)
            if shape is None:
                raise Unfollowed(f"{self.called(node)} depends on values of the input")
            if argument_ in indices:
                return torch.zeros(shape, dtype=torch.int64)
            return torch.full((1,) * len(shape), _NO_LABEL, dtype=torch.int32).expand(shape)

        args = [given(item) for item in node.args]
        kwargs = {key: given(item) for key, item in node.kwargs.items()}
        # Labels are expanded, so that a view of them may need a copy.
        target = torch.reshape if name in ("view", "_unsafe_view") else node.target
        assert callable(target)
        try:
            return target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise Unfollowed(
                f"{self.called(node)} cannot be followed: {one_line(error)}"
            ) from error

    def _indices(self, labels: Mapping[Node, Any], node: Node, name: str) -> frozenset[Node]:
        """Return the values that choose elements; what they choose among has to carry one label."""
        if name == "index":
            places = list(enumerate(node.args[1]))  # type: ignore[arg-type]
        elif name == "index_select":
            places = [(argument(node, 1, "dim"), argument(node, 2, "index"))]
        else:
            return frozenset()
        held = labels.get(node.args[0])  # type: ignore[arg-type]
        chosen = [(axis, item) for axis, item in places if isinstance(item, Node)]
        for axis, item in chosen:
            value = item.meta.get("val")
            if item in labels or held is None or getattr(value, "dtype", None) == torch.bool:
                raise Unfollowed(f"{self.called(node)} chooses by values of the input")
            if not torch.equal(held.amin(axis), held.amax(axis)):
                raise Unfollowed(f"{self.called(node)} chooses channels by values of the input")
        return frozenset(item for _, item in chosen)

    # -- scaling ------------------------------------------------------------------------------

    def _scaled(self, flow: Flow, node: Node, name: str) -> None:
        """Let a scale pass through a product, or through a sum of values that all carry it."""
        shape = shape_of(node)
        operands = [a for a in node.args[(name == "where") :] if isinstance(a, Node | int | float)]
        held = [a for a in operands if isinstance(a, Node) and a in flow.labels]
        others = [a for a in operands if a not in held]
        refused = Unfollowed(f"its output is read by {self.called(node)}, which is no linear layer")
        if shape is None or (node.args[0] in flow.labels and name == "where"):
            raise refused
        if name in SCALES and (len(held) != 1 or (name != "mul" and node.args[0] is not held[0])):
            raise refused
        if name in ("where", "masked_fill"):
            others = [a for a in operands[(name == "masked_fill") :] if a not in held]
            if name == "masked_fill" and node.args[1] in flow.labels:
                raise refused
            if not all(_is_zero(a) for a in others if name == "where" or a is not node.args[1]):
                raise refused
        elif name in ("add", "sub") and (others or node.kwargs):
            raise refused
        spread = [flow.labels[a].expand(shape) for a in held]
        if any(not torch.equal(spread[0], other) for other in spread[1:]):
            raise Unfollowed(f"in {self.called(node)} its channels meet other channels of it")
        flow.no_shift = flow.no_shift or f"{self.called(node)} lets no shift pass"
        _set(flow, node, spread[0])

    # -- reading ------------------------------------------------------------------------------

    def _read(self, flow: Flow, node: Node, contraction: Contraction) -> None:
        if any(n in flow.labels for n in node.all_input_nodes if n is not contraction.value):
            raise Unfollowed(f"{self.called(node)} multiplies it by itself")
        found = self.operands.get((node, contraction.weight))
        if found is None:
            raise Unfollowed(
                f"{self.called(node)} multiplies it by a value that is computed, not by a weight"
            )
        name, operand = found
        axis = operand.axes[contraction.weight_axis]
        held = flow.labels[contraction.value].movedim(contraction.value_axis, -1)
        rows = held.reshape(-1, held.shape[-1])
        if not torch.equal(rows.amin(0), rows.amax(0)):
            raise Unfollowed(f"{self.called(node)} reads different channels at different places")
        size = shape_of(self.observed.placeholders(name)[0])
        if axis is None or size is None or (axis.start, axis.length) != (0, size[axis.axis]):
            raise Unfollowed(f"{self.called(node)} reads it by a part of {name} only")
        bias = None
        if contraction.bias is not None:
            bias = self.operands.get((node, contraction.bias))
            if bias is None:
                flow.no_shift = f"{self.called(node)} adds a value that is computed"
        flow.reads.append(
            Read(
                node, name, operand, axis.axis, tuple(rows[0].tolist()), bias,
                contraction.bias is None, contraction.no_shift,
            )
        )  # fmt: skip
        flow.no_shift = flow.no_shift or contraction.no_shift


def _set(flow: Flow, node: Node, labels: Any) -> None:
    if labels is None:
        return
    if isinstance(labels, Tensor):
        if bool((labels >= 0).any()):
            flow.labels[node] = labels
    elif any(bool((part >= 0).any()) for part in labels):
        flow.labels[node] = list(labels)


def _is_zero(value: Any) -> bool:
    """Return whether a value is a constant zero."""
    if isinstance(value, int | float):
        return bool(value == 0)
    if not isinstance(value, Node):
        return False
    name = op_name(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return not [user for user in value.users if op_name(user).endswith("_")]
    return name in ("scalar_tensor", "full") and number(value.args[-1]) == 0
