"""A map per channel, followed from a norm to the layers that read it.

    label[p] = the channel whose scale an element p of a value carries; -1: none

What an operator does to labels stands in `rewrite.observe.labels`. At a layer they have to be the
same wherever it reads: then they say which input of the layer carries which channel. Anything that
is not known refuses, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.graph.traits import argument
from rewrite.observe.export import ObservedCall
from rewrite.observe.labels import Unfollowed, moved, scaled
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
    casts_to_integers,
    contraction_of,
    is_active_dropout,
    op_name,
    pads_nothing,
    shape_of,
)
from rewrite.observe.weight_axes import Operand, operands_of


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
            Unfollowed: somebody reads a value and cannot absorb its map.
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
            self._same(flow, node)
        elif pads_nothing(node):
            flow.of_size[self.observed.called(node)] = None
            self._same(flow, node)
        elif name == "getitem":
            held: Any = flow.labels[node.args[0]]  # type: ignore[index]  # by the operator's schema
            index: Any = node.args[1]
            _set(flow, node, held[index] if isinstance(held, list | tuple) else held)
        elif is_split_by_values(node) or name in REDUCES:
            self._reduced(flow, node, name)
        elif name in MOVES:
            _set(flow, node, moved(self.observed, flow.labels, node))
        elif contraction is not None:
            self._read(flow, node, contraction)
        elif name in SCALES or name in ("neg", "add", "sub", "where", "masked_fill"):
            _set(flow, node, scaled(self.observed, flow.labels, node))
            flow.no_shift = flow.no_shift or f"{self.observed.called(node)} lets no shift pass"
        else:
            raise Unfollowed(
                f"its output is read by {self.observed.called(node)}, which is no linear layer"
            )

    def _same(self, flow: Flow, node: Node) -> None:
        if node.args[0] not in flow.labels:
            return  # only its type is read
        if casts_to_integers(node):
            raise Unfollowed(f"its output is cast to integers, {self.observed.called(node)}")
        if is_active_dropout(node):
            raise Unfollowed(
                f"its output is read by a dropout that is active, {self.observed.called(node)}"
            )
        _set(flow, node, flow.labels[node.args[0]])  # type: ignore[index]  # by the operator's schema

    def _reduced(self, flow: Flow, node: Node, name: str) -> None:
        held = flow.labels.get(node.args[0])  # type: ignore[arg-type]  # by the operator's schema
        if not isinstance(held, Tensor):
            raise Unfollowed(
                f"its output is read by {self.observed.called(node)}, which is no linear layer"
            )
        try:
            if name in REDUCES:
                labels, shifts = reduced(node, held)
                if not shifts:
                    flow.no_shift = (
                        flow.no_shift or f"{self.observed.called(node)} lets no shift pass"
                    )
                _set(flow, node, labels)
            else:
                axis, sizes = argument(node, 2, "dim", 0), argument(node, 1, "split_sizes")
                _set(flow, node, split_labels(held, axis, len(sizes)))
        except Mixed:
            raise Unfollowed(
                f"in {self.observed.called(node)} its channels meet each other"
            ) from None

    def _read(self, flow: Flow, node: Node, contraction: Contraction) -> None:
        if any(n in flow.labels for n in node.all_input_nodes if n is not contraction.value):
            raise Unfollowed(f"{self.observed.called(node)} multiplies it by itself")
        found = self.operands.get((node, contraction.weight))
        if found is None:
            raise Unfollowed(
                f"{self.observed.called(node)} multiplies it by a value that is computed, "
                "not by a weight"
            )
        name, operand = found
        axis = operand.axes[contraction.weight_axis]
        held = flow.labels[contraction.value].movedim(contraction.value_axis, -1)
        rows = held.reshape(-1, held.shape[-1])
        if not torch.equal(rows.amin(0), rows.amax(0)):
            raise Unfollowed(
                f"{self.observed.called(node)} reads different channels at different places"
            )
        size = shape_of(self.observed.placeholders(name)[0])
        if axis is None or size is None or (axis.start, axis.length) != (0, size[axis.axis]):
            raise Unfollowed(f"{self.observed.called(node)} reads it by a part of {name} only")
        bias = None
        if contraction.bias is not None:
            bias = self.operands.get((node, contraction.bias))
            if bias is None:
                flow.no_shift = f"{self.observed.called(node)} adds a value that is computed"
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
