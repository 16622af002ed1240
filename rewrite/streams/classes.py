"""Classes of values that have to change together, what makes them, and who reads them.

A map M of the channels of a class changes nothing else if every *source* of the class (a linear
layer, an embedding, a parameter) is given M, and every *reader* takes it away or is blind to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.observe.export import ObservedCall
from rewrite.observe.spellings import shape_of
from rewrite.streams.norms import NormCall


class CallKind(StrEnum):
    """What a value is made by, or read by."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"
    SCALED = "scaled"
    NORM = "norm"
    OTHER = "other"


@dataclass(frozen=True)
class ParameterAxis:
    """A parameter that a map of channels goes into: along one of its axes."""

    tensor: str
    axis: int


@dataclass(frozen=True, eq=False)
class ClassSource:
    """What a class of values comes from.

    Attributes:
        node: the call, or the placeholder of a parameter.
        uses: the parameters that the channels of the value are axes of.
        norm: the norm that makes it.
        scale: the parameter that it is multiplied by, channel by channel.
        inner: the value that is multiplied so.
        problem: why its parameters cannot be given a map, or "".
    """

    node: Node
    kind: CallKind
    uses: tuple[ParameterAxis, ...] = ()
    norm: NormCall | None = None
    scale: str | None = None
    inner: Node | None = None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class ClassReader:
    """A call that reads a value of a class and makes a value of another of it.

    Attributes:
        node: the call.
        value: what it reads.
        use: the parameter that meets the channels.
        norm: the norm that it is.
        tiles: how many times over it reads the channels, in their order (0: in no such order).
    """

    node: Node
    value: Node
    kind: CallKind
    use: ParameterAxis | None = None
    norm: NormCall | None = None
    tiles: int = 1


class ValueClasses:
    """The classes of the values of one call.

    Attributes:
        labels: per value, which channel each of its elements is.
    """

    def __init__(self, observed: ObservedCall) -> None:
        self.observed = observed
        self.labels: dict[Node, Any] = {}
        self._above: dict[Node, Node] = {}
        self._sources: list[ClassSource] = []
        self._readers: list[ClassReader] = []

    def top(self, node: Node) -> Node:
        """Return the value that stands for the class of a value."""
        while (above := self._above.get(node, node)) is not node:
            node = above
        return node

    def members(self, top: Node) -> list[Node]:
        """Return the values of a class."""
        return [node for node in self.labels if self.top(node) is top]

    def sources(self, top: Node) -> list[ClassSource]:
        """Return what a class comes from, in data-flow order."""
        return [source for source in self._sources if self.top(source.node) is top]

    def readers(self, top: Node) -> list[ClassReader]:
        """Return who reads a class, in data-flow order."""
        return [reader for reader in self._readers if self.top(reader.value) is top]

    def returned(self, top: Node) -> list[str]:
        """Return the paths under which the call returns a value of a class."""
        outputs = self.observed.outputs
        return [path for node in outputs if self.top(node) is top for path in outputs[node]]

    def _put(self, node: Node, labels: Any, source: ClassSource | None, *others: Node) -> None:
        self.labels[node] = labels
        if source is not None:
            self._sources.append(source)
        for other in others:
            self._above[self.top(other)] = self.top(node)

    # -- what a value is made by ----------------------------------------------------------------

    def depends(self, tops: set[Node]) -> Iterator[Node]:
        """Yield the nodes that are computed from values of some classes."""
        found: set[Node] = set()
        for node in self.observed.graph.nodes:
            inputs = node.all_input_nodes
            if any(n in found or (n in self.labels and self.top(n) in tops) for n in inputs):
                found.add(node)
                yield node

    # -- building -------------------------------------------------------------------------------

    def _begin(self, node: Node, kind: CallKind, axis: int = -1, **details: Any) -> None:
        """Begin a class at a value whose channels are one of its axes."""
        labels = _fresh(node, axis)
        if labels is not None:
            self._put(node, labels, ClassSource(node, kind, **details))

    def _alike(self, node: Node, value: Node, labels: Any) -> None:
        if labels is None:
            self._refused(node, [value])
        else:
            self._put(node, labels, None, value)

    def _refused(self, node: Node, read: list[Node], **details: Any) -> None:
        """Let a call read its inputs, and begin a class: it is not linear in them."""
        self._readers += [ClassReader(node, value, CallKind.OTHER) for value in read]
        self._begin(node, CallKind.OTHER, **details)

    def of(self, node: Node, top: Node) -> bool:
        """Return whether a node is a value of a class."""
        return node in self.labels and self.top(node) is top

    def width(self, value: Node) -> int:
        """Return how many channels a value has."""
        held = self.labels[value]
        parts = held if isinstance(held, list | tuple) else [held]
        return max((int(part.max()) + 1 for part in parts if part.numel()), default=0)


def _fresh(node: Node, axis: int) -> Tensor | None:
    value, shape = node.meta.get("val"), shape_of(node)
    if shape is None or not shape or not value.is_floating_point():  # type: ignore[union-attr]  # a value with a shape is a Tensor
        return None
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=torch.int32).reshape(view).expand(shape)
