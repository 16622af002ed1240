"""Propagate the scales of channels through operations without weights.

y = f(x)     f(d x) = d f(x): relu, pooling     x and y share a scale
y = x + z    all three share a scale
y = x + b,   y = min(x, b),   y = max(x, b)     b, a tensor of the model with one number per
                                                channel, is scaled like x: b → D b
y = [x, z]   each part keeps its own scale
y = x g      g a gate or a constant: x and y share a scale, g keeps its own
y = P x      a view, a transposition: a tensor of labels shows where each channel goes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.algebra import KernelLayout
from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.laws import Constraints, cast_refusal
from rewrite.affine.layers import Layer
from rewrite.affine.planner import Planner
from rewrite.affine.slices import Parts
from rewrite.affine.tensor_readers import TensorReaders
from rewrite.graph.captured import Captured
from rewrite.graph.traits import Call, Trait, call_of
from rewrite.rescaling.clipped import rectifies

_SUMS = frozenset({"add", "sub", "rsub", "maximum", "minimum"})


class Units:
    """Labels of channels in a union-find structure: channels that share a scale have one root.

    Labels are integers. The scale of a root may be fixed to 1.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Return new labels, (count,) int64, each its own root."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """Return the root of a label."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """Return the roots of many labels."""
        return torch.tensor([self.root(label) for label in labels.tolist()], dtype=torch.int64)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Unite the labels of two values, (C,) each, position by position."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parents[b] = a
                if (reason := self._reasons.pop(b, None)) is not None:
                    self._reasons.setdefault(a, reason)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Fix the scales of channels to 1; the first reason is kept."""
        for label in set(labels.tolist()):
            self._reasons.setdefault(self.root(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why the scale of a label is fixed to 1, None if it is free."""
        return self._reasons.get(self.root(label))


@dataclass(eq=False)
class ScaledLayer:
    """One layer, with the labels of the channels that it reads and writes."""

    layer: Layer
    reads: Tensor
    writes: Tensor


class ScaledOperations:
    """Propagates labels through operations without weights.

    Args:
        planner: the planner of the captured model.
        units: the labels, to be united and fixed.
        known: the labels of each value that was visited.
        clipped: calls of clipping activations that become ReLU.
    """

    def __init__(
        self,
        planner: Planner,
        units: Units,
        known: Mapping[Node, ChannelMap],
        clipped: frozenset[Node],
    ) -> None:
        self._captured = planner.captured
        self._called = planner.called
        self._rules = planner.context.rules
        self._ranks = planner.context.ranks
        self._parts = Parts(self._captured, self._ranks)
        self._planner = planner
        self._units = units
        self._known = known
        self._clipped = clipped
        self.vectors: list[ScaledLayer] = []
        self.scattered: dict[Node, Tensor] = {}
        """Labels, position by position, of values whose channels lie along several axes."""

    def result(self, node: Node, inputs: list[Node]) -> ChannelMap | None:
        """Return the labels of a call's result, if any; fix those of inputs it cannot scale.

        Args:
            node: the call.
            inputs: its inputs that have labels.
        """
        inputs = [value for value in inputs if not self._rules.reads_only_shape(node, value)]
        if not inputs:
            return None
        try:
            return self._through(node, inputs)
        except DeclinedError as declined:
            if len(inputs) == 1 and self._moved(node, self._placed(inputs[0])):
                return None
            for value in inputs:
                self._units.fix(self._known[value].index, str(declined))
            return None

    def gathered(self, node: Node, inputs: list[Node]) -> ChannelMap | None:
        """Return the labels of a call on scattered values, if they lie along one axis again.

        Args:
            node: the call.
            inputs: its inputs whose labels vary along several axes.
        """
        inputs = [value for value in inputs if not self._rules.reads_only_shape(node, value)]
        if len(inputs) == 1 and self._moved(node, self.scattered[inputs[0]]):
            found = along_one_axis(self.scattered[node])
            if found is not None:
                del self.scattered[node]
            return found
        for value in inputs:
            reason = f"{self._called(node)} reads channels that lie along several axes"
            self._units.fix(self.scattered[value].flatten(), reason)
        return None

    def _placed(self, value: Node) -> Tensor | None:
        """Return the label of each element of a value, in its shape; None if that is unknown."""
        found, shape = self._known[value], self._captured.shape(value)
        if shape is None or found.axis >= 0 or found.spread:
            return None
        return found.index.view(-1, *(1,) * (-found.axis - 1)).expand(shape)

    def _moved(self, node: Node, labels: Tensor | None) -> bool:
        """Apply a view, a transposition or a copy to labels; return False for other calls."""
        call, shape = call_of(self._captured, node), self._captured.shape(node)
        if call is None or labels is None or shape is None or shape.numel() != labels.numel():
            return False
        if call.name in ("view", "flatten", "unflatten"):
            if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
                return False
            self.scattered[node] = labels.reshape(shape)
        elif call.name == "transpose":
            self.scattered[node] = labels.transpose(call.get("dim0"), call.get("dim1"))
        elif call.name == "permute":
            self.scattered[node] = labels.permute(call.get("dims"))
        elif call.name in ("contiguous", "clone"):
            self.scattered[node] = labels
        else:
            return False
        return True

    def _through(self, node: Node, inputs: list[Node]) -> ChannelMap:
        first, call = self._known[inputs[0]], call_of(self._captured, node)
        if node in self._clipped or (call is not None and _keeps(call)):
            return first
        if call is not None and call.name in _SUMS:
            return self._sum(call, inputs)
        if call is not None and call.name in ("mul", "div"):
            return self._product(call, inputs)
        joined = self._parts.join(node)
        if joined is not None:
            return self._join(node, *joined)
        if len(inputs) > 1:
            raise DeclinedError(f"{self._called(node)} combines values in a way not followed", node)
        part = self._parts.part(node, first, Direction.FORWARD)
        if part is not None:
            return part
        if call is not None and call.name == "pixel_shuffle":
            first = self._shuffled(call, first)
        found = self._rules.around(node, inputs[0], first, Constraints(True, lambda ways: 0))
        if node not in found:
            raise DeclinedError(f"{self._called(node)} does not pass a scale on", node)
        return found[node]

    def _sum(self, call: Call, inputs: list[Node]) -> ChannelMap:
        called = self._called(call.node)
        if len(inputs) == 1 and (found := self._known[inputs[0]]).axis < 0:
            vector = vector_of(self._planner, call, found)
            if vector is not None:
                self.vectors.append(ScaledLayer(vector, found.index[:0], found.index))
                return found
        if any(operand not in self._known for operand in (call.operand, call.get("other"))):
            raise DeclinedError(f"{called} adds something whose scale is fixed", call.node)
        first, *others = (self._known[value] for value in inputs)
        for other in others:
            if not _alike(first, other):
                raise DeclinedError(f"{called} adds values whose channels lie differently")
            self._units.unite(first.index, other.index)
        if self._ranks.size(call.node, first.axis) not in (None, len(first.index)):
            raise DeclinedError(f"{called} broadcasts the channels", call.node)
        return first

    def _product(self, call: Call, inputs: list[Node]) -> ChannelMap:
        node, called = call.node, self._called(call.node)
        if len(inputs) > 1 or call.operand is call.get("other"):
            raise DeclinedError(f"{called} multiplies or divides two computed values", node)
        if call.name == "div" and call.operand is not inputs[0]:
            raise DeclinedError(f"{called} divides by a computed value", node)
        if call.get("rounding_mode") is not None:
            raise DeclinedError(f"{called} rounds", node)
        found = self._known[inputs[0]]
        if self._ranks.size(node, found.axis) != len(found.index):
            raise DeclinedError(f"{called} may broadcast the channels (pass example_inputs)", node)
        return found

    def _join(self, node: Node, parts: list[Node], axis: int) -> ChannelMap:
        """Concatenate the labels of the parts; a part without labels gets fixed ones."""
        called = self._called(node)
        known = [self._known[part] for part in parts if part in self._known]
        if axis >= 0 or any(part.axis >= 0 or part.spread for part in known):
            raise DeclinedError(
                f"how the channels lie in {called} is unknown (pass example_inputs)", node
            )
        if axis != known[0].axis:
            if len(known) < len(parts) or not all(_alike(known[0], other) for other in known):
                raise DeclinedError(f"{called} stacks values whose scales are fixed", node)
            for other in known[1:]:
                self._units.unite(known[0].index, other.index)
            return known[0]
        labels = [self._labels(node, part, axis) for part in parts]
        return known[0].moved(axis, torch.cat(labels))

    def _labels(self, node: Node, part: Node, axis: int) -> Tensor:
        """Return the labels of one part of a concatenation."""
        found = self._known.get(part)
        if found is not None and found.axis == axis:
            return found.index
        size = self._ranks.size(part, axis)
        if found is not None or size is None:
            raise DeclinedError(
                f"how the channels lie in {part.name}, a part of {self._called(node)}, is unknown",
                node,
            )
        fixed = self._units.new(size)
        self._units.fix(fixed, f"{part.name} has a fixed scale")
        return fixed

    def _shuffled(self, call: Call, given: ChannelMap) -> ChannelMap:
        """Unite the channels that a pixel shuffle merges into one."""
        factor = call.get("upscale_factor")
        if not isinstance(factor, int) or len(given.index) % factor**2:
            raise DeclinedError("a pixel shuffle by an unknown factor", call.node)
        rows = given.index.view(-1, factor**2)
        for column in range(1, factor**2):
            self._units.unite(rows[:, 0], rows[:, column])
        return given.moved(given.axis, self._units.roots(given.index))


def along_one_axis(labels: Tensor) -> ChannelMap | None:
    """Return the axis and labels of channels if labels (batch, *axes) vary along one axis only."""
    rank = labels.dim()
    varying = [a for a in range(rank) if not bool((labels == labels.narrow(a, 0, 1)).all())]
    if len(varying) != 1 or varying[0] == 0:
        return None
    axis = varying[0]
    index = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)[:, 0].contiguous()
    return ChannelMap(axis - rank, index, scale=True, shift=False)


def _keeps(call: Call) -> bool:
    """Return whether a call keeps the order of its operand's channels, or splits them."""
    return call.name == "abs" or rectifies(call) or Trait.SPLITS in call.operation.traits


def _alike(one: ChannelMap, other: ChannelMap) -> bool:
    return (one.axis, len(one.index), one.spread) == (other.axis, len(other.index), other.spread)


def vector_of(planner: Planner, call: Call, found: ChannelMap) -> Layer | None:
    """Return the model's tensor in a sum, minimum or maximum as a layer with only a bias, if any.

    Args:
        planner: the planner of the captured model.
        call: a sum, a minimum or a maximum.
        found: the axis and labels of the channels of the other operand.

    Raises:
        DeclinedError: the tensor must not change, or does not have one number per channel.
    """
    captured, called = planner.captured, planner.called(call.node)
    node = _read(captured, call.operand) or _read(captured, call.get("other"))
    ref = None if node is None else captured.ref(node)
    if node is None or ref is None:
        return None
    tensor, channels = captured.tensor(ref), len(found.index)
    place = tensor.dim() + found.axis
    if not 0 <= place < tensor.dim() or tensor.numel() != channels != 1:
        raise DeclinedError(f"{called} adds something whose scale is fixed", call.node)
    if tensor.shape[place] != channels or found.spread:
        raise DeclinedError(f"{called}: {ref.name} is not one number a channel", call.node)
    if not captured.is_fixed(node):
        raise DeclinedError(f"{called}: {ref.name} is not the same at every call", call.node)
    readers = planner.context.tensor_readers
    if len(_computing(captured, readers, ref.name)) != 1:
        raise DeclinedError(f"{called}: {ref.name} is read at several places", call.node)
    layer = Layer(
        ref.name, "vector", call.node, None, found.axis, channels, channels, KernelLayout(), None,
        ref,
    )  # fmt: skip
    if (reason := readers.refusal(layer)) is not None:
        raise DeclinedError(reason, call.node)
    return layer


def _read(captured: Captured, value: Any) -> Node | None:
    """Return the node that reads the model's tensor in `value`, cast or not."""
    while isinstance(value, Node) and _casts(captured, value):
        value = value.all_input_nodes[0]
    return None if captured.ref(value) is None else value


def _casts(captured: Captured, node: Node) -> bool:
    call = call_of(captured, node)
    if call is None or Trait.CASTS not in call.operation.traits:
        return False
    return cast_refusal(captured, call) is None


def _computing(captured: Captured, readers: TensorReaders, name: str) -> list[Node]:
    """Return the nodes that compute with a tensor, cast or not."""
    found: list[Node] = []
    lines = list(readers.lines(name))
    while lines:
        line = lines.pop()
        if _casts(captured, line):
            lines.extend(line.users)
        else:
            found.append(line)
    return found
