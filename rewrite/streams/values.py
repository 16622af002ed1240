"""The values of an exported call, put together where they have to change together.

    x + y, x.view(..), cat([x, y]), sum over tokens      one class
    m.x, x + m (y - x), m one number a token             one class
    W x + b, norm(x), gelu(x), softmax(x)      another class, which this one is read for

A map M of the channels of a class changes nothing else if every *source* of the class (a linear
layer, an embedding, a parameter) is given M, and every *reader* takes it away or is blind to it.
Channels are followed by labels, as in `rewrite.observe.flow`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.graph.traits import argument
from rewrite.observe.export import ObservedCall
from rewrite.observe.flow import Follower
from rewrite.observe.labels import Unfollowed, moved
from rewrite.observe.norms import expression_of
from rewrite.observe.spellings import (
    FORM,
    MOVES,
    SAME,
    SCALES,
    casts_to_integers,
    contraction_of,
    is_active_dropout,
    op_name,
    shape_of,
)
from rewrite.streams.classes import CallKind, ClassReader, ParameterAxis
from rewrite.streams.layers import LayerValues, is_weight
from rewrite.streams.norms import NormCall, norm_calls


class Values(LayerValues):
    """The classes of the values of one call, followed from its first line to its last."""

    def __init__(self, observed: ObservedCall, follower: Follower) -> None:
        super().__init__(observed, follower)
        self.norms = tuple(norm_calls(observed))
        made = {norm.node: norm for norm in self.norms}
        inside = {node for norm in self.norms for node in norm.inside}
        held, weights = self._of_parameters()
        for node in observed.graph.nodes:
            if node in made:
                self._norm(made[node])
            elif node in inside or node in weights:
                continue
            elif node.op == "placeholder" or node in held:
                self._given(node, held)
            elif node.op == "call_function":
                self._visit(node)

    def _of_parameters(self) -> tuple[set[Node], set[Node]]:
        """Return what is moved of parameters that are values, and of those that are only weights.

        The second are given no labels, whatever their size.
        """
        held: set[Node] = set()
        weights: set[Node] = set()
        for readers in self.follower.readers.values():
            for reader, operand in readers:
                found = weights if is_weight(reader, operand.node) else held
                node: Any = operand.node
                while isinstance(node, Node) and node not in found:
                    found.add(node)
                    node = node.args[0] if node.args else None
        return held, weights - held

    def _given(self, node: Node, held: set[Node]) -> None:
        """Begin a class at a parameter or an input, or go on with what is moved of it."""
        if node.op == "call_function":
            self._visit(node)
        elif node not in self.observed.tensors:
            self._begin(node, CallKind.OTHER)
        elif node in held:
            shape = shape_of(node) or ()
            use = (ParameterAxis(self.observed.tensors[node], len(shape) - 1),)
            self._begin(node, CallKind.PARAMETER, uses=use)

    def _norm(self, norm: NormCall) -> None:
        if norm.value in self.labels:
            whole = _is_last(self.labels[norm.value], norm.channels)
            kind = CallKind.NORM if whole else CallKind.OTHER
            self._readers.append(ClassReader(norm.node, norm.value, kind, norm=norm))
        self._begin(norm.node, CallKind.NORM, norm=norm)

    def _visit(self, node: Node) -> None:
        name = op_name(node)
        read = [item for item in node.all_input_nodes if item in self.labels]
        if name in FORM or (not read and name not in ("embedding",)):
            self._begin(node, CallKind.OTHER)
        elif name == "embedding":
            self._embedding(node)
        elif name in SAME and not is_active_dropout(node) and not casts_to_integers(node):
            if node.args[0] in self.labels:
                self._alike(node, read[0], self.labels[node.args[0]])  # type: ignore[index]  # by the operator's schema
            else:
                self._begin(node, CallKind.OTHER)  # only its type is read
        elif name == "getitem":
            held: Any = self.labels[read[0]]
            index: Any = node.args[1]
            part = held[index] if isinstance(held, list | tuple) else None
            self._alike(node, read[0], part)
        elif name in MOVES:
            self._moved(node, read)
        elif (contraction := contraction_of(node, self.labels)) is not None:
            self._linear(node, contraction, read)
        elif name in ("add", "sub") and len(read) == 2 and read[0] is not read[1]:
            self._sum(node, read)
        elif name == "lerp":
            self._between(node, read)
        elif name == "neg":
            self._alike(node, read[0], self.labels[read[0]])
        elif name in SCALES:
            self._product(node, name, read)
        elif name in ("sum", "mean"):
            self._reduced(node, read)
        elif name.startswith("upsample_"):
            self._resampled(node, read)
        else:
            self._refused(node, read)

    def _moved(self, node: Node, read: list[Node]) -> None:
        try:
            labels = moved(self.observed, self.labels, node)
        except Unfollowed:
            labels = None
        if labels is None or len({self.width(value) for value in read}) > 1:
            self._refused(node, read)
        else:
            self._put(node, labels, None, *read)

    def _sum(self, node: Node, read: list[Node]) -> None:
        if (labels := self._common(node, read)) is None:
            return self._refused(node, read)
        return self._put(node, labels, None, *read)

    def _common(self, node: Node, read: list[Node]) -> Tensor | None:
        """Return the labels that two values have in the shape of `node`; None if they differ."""
        shape = shape_of(node)
        labels = [self.labels[value] for value in read]
        if shape is None or not all(isinstance(held, Tensor) for held in labels):
            return None
        if len(labels) != 2 or len({self.width(value) for value in read}) > 1:
            return None
        one, other = (held.expand(shape) for held in labels)
        return one if torch.equal(one, other) else None

    def _product(self, node: Node, name: str, read: list[Node]) -> None:
        """Go on through a factor of one number a token; note one of a number a channel."""
        shape = shape_of(node) or ()
        operands = list(node.args[:2])
        scaled = operands[: 1 if "div" in name else 2]
        # What has more channels is scaled: a factor of one number has a channel of its own.
        for value in sorted(scaled, key=self._channels, reverse=True):
            other = next((held for held in operands if held is not value), None)
            if not isinstance(value, Node) or value not in self.labels or other is None:
                continue
            labels = self.labels[value]
            if not isinstance(labels, Tensor) or len(shape) < labels.ndim:
                continue
            if _one_a_token(labels, other):
                if isinstance(other, Node) and other in self.labels:
                    self._readers.append(ClassReader(node, other, CallKind.OTHER))
                return self._put(node, labels.expand(shape), None, value)
            scale = expression_of(self.observed, other) if "div" not in name else None
            if scale is not None and (scale.factor, scale.offset) == (1.0, 0.0):
                along = self.labels.get(other) if isinstance(other, Node) else None
                if along is not None and torch.equal(labels.expand(shape), along.expand(shape)):
                    self._readers.append(ClassReader(node, value, CallKind.SCALED))
                    return self._begin(node, CallKind.SCALED, scale=scale.tensor, inner=value)
        return self._refused(node, read)

    def _channels(self, value: Any) -> int:
        """Return how many channels a value has, 0 if it has no labels."""
        return self.width(value) if isinstance(value, Node) and value in self.labels else 0

    def _between(self, node: Node, read: list[Node]) -> None:
        """Go on through a + t (b - a), a sum of a and b where t is one number a token."""
        ends = (node.args[0], argument(node, 1, "end"))
        weight = argument(node, 2, "weight")
        both = [value for value in read if value in ends]
        labels = self._common(node, both)
        if labels is None or not _one_a_token(labels, weight):
            return self._refused(node, read)
        if weight in self.labels:
            self._readers.append(ClassReader(node, weight, CallKind.OTHER))
        return self._put(node, labels, None, *both)

    def _reduced(self, node: Node, read: list[Node]) -> None:
        """Go on through a sum or a mean over axes that are no channels."""
        labels, dims = self.labels[read[0]], argument(node, 1, "dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(labels, Tensor) or not isinstance(dims, list | tuple) or not dims:
            return self._refused(node, read)
        keeps = bool(argument(node, 2, "keepdim", False))
        low, high = (f(labels, tuple(dims), keeps) for f in (torch.amin, torch.amax))
        return self._alike(node, read[0], low if torch.equal(low, high) else None)

    def _resampled(self, node: Node, read: list[Node]) -> None:
        """Go on through an interpolation of maps, each channel by itself."""
        labels, shape = self.labels[read[0]], shape_of(node)
        if shape is None or len(read) != 1 or not isinstance(labels, Tensor) or labels.ndim < 3:
            return self._refused(node, read)
        first = labels[(slice(None), slice(None), *(slice(1),) * (labels.ndim - 2))]
        same = torch.equal(labels, first.expand(labels.shape))
        return self._alike(node, read[0], first.expand(shape) if same else None)


def _is_last(labels: Any, channels: int) -> bool:
    """Return whether the channels are the last axis of a value, in their order, all of them."""
    if not isinstance(labels, Tensor) or labels.shape[-1] != channels:
        return False
    return torch.equal(labels, torch.arange(channels, dtype=labels.dtype).expand(labels.shape))


def _one_a_token(labels: Tensor, other: object) -> bool:
    """Return whether a factor is the same for all channels of a value."""
    if isinstance(other, int | float):
        return True
    if not isinstance(other, Node) or not isinstance(other.meta.get("val"), Tensor):
        return False
    sizes = shape_of(other)
    if sizes is None:
        return False
    for place in range(1, labels.ndim + 1):
        if place > len(sizes) or sizes[-place] == 1:
            continue
        if not torch.equal(labels.amin(-place), labels.amax(-place)):
            return False
    return True
