"""Layers of an exported call as readers and writers of classes: which tensors, which axes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.observe.export import ObservedCall
from rewrite.observe.flow import Follower
from rewrite.observe.spellings import Contraction, contraction_of, op_name, shape_of
from rewrite.observe.weight_axes import Axis, Operand
from rewrite.streams.classes import CallKind, ClassReader, ParameterAxis, ValueClasses


class LayerValues(ValueClasses):
    """Classes of values that know the layers between them."""

    def __init__(self, observed: ObservedCall, follower: Follower) -> None:
        super().__init__(observed)
        self.follower = follower

    def _embedding(self, node: Node) -> None:
        held = self.follower.operands.get((node, node.args[0]))  # type: ignore[arg-type]  # by the operator's schema
        uses, problem = self._uses((held, -1))
        self._begin(node, CallKind.EMBEDDING, uses=uses, problem=problem)

    def _linear(self, node: Node, contraction: Contraction, read: list[Node]) -> None:
        held = self.follower.operands.get((node, contraction.weight))
        if held is None:
            return self._refused(node, read)
        use = _whole(held[1], contraction.weight_axis, self._size(held[0]))
        tiles = self._tiles(contraction)
        kind = CallKind.LINEAR if use is not None and tiles else CallKind.OTHER
        meets = None if use is None else ParameterAxis(held[0], use)
        self._readers.append(ClassReader(node, contraction.value, kind, meets, tiles=tiles))
        others = [v for v in read if v not in (contraction.value, contraction.bias)]
        self._readers += [ClassReader(node, value, CallKind.OTHER) for value in others]
        weight_axis, axis = _out_axes(node, contraction)
        if weight_axis is None:
            return self._begin(node, CallKind.OTHER)
        bias = None
        if contraction.bias is not None:
            bias = self.follower.operands.get((node, contraction.bias))
            if bias is None:
                self._readers.append(ClassReader(node, contraction.bias, CallKind.OTHER))
                return self._begin(node, CallKind.OTHER, axis)
        pairs = [(held, weight_axis)] if bias is None else [(held, weight_axis), (bias, -1)]
        uses, problem = self._uses(*pairs)
        return self._begin(node, CallKind.LINEAR, axis, uses=uses, problem=problem)

    def _tiles(self, contraction: Contraction) -> int:
        """Return how many times over a layer reads the channels, in their order; else 0."""
        held = self.labels[contraction.value]
        if not isinstance(held, Tensor):
            return 0
        rows = held.movedim(contraction.value_axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        width = self.width(contraction.value)
        if not len(rows) or not torch.equal(rows.amin(0), rows.amax(0)):
            return 0
        wanted = torch.arange(len(rows[0]), dtype=rows.dtype) % max(width, 1)
        whole = len(rows[0]) % max(width, 1) == 0
        return len(rows[0]) // width if whole and torch.equal(rows[0], wanted) else 0

    def _uses(
        self, *pairs: tuple[tuple[str, Operand] | None, int]
    ) -> tuple[tuple[ParameterAxis, ...], str]:
        """Return the parameters that a layer writes by, or why they cannot be given a map."""
        uses = []
        for held, place in pairs:
            if held is None:
                return (), "its weight is computed"
            axis = _whole(held[1], place, self._size(held[0]))
            if axis is None:
                return (), f"it writes by a part of {held[0]}"
            uses.append(ParameterAxis(held[0], axis))
        return tuple(uses), ""

    def _size(self, tensor: str) -> tuple[int, ...]:
        return shape_of(self.observed.placeholders(tensor)[0]) or ()


def _whole(operand: Operand, place: int, size: tuple[int, ...]) -> int | None:
    """Return the axis of a parameter that an axis of an operand is, all of it; else None."""
    axis: Axis | None = operand.axes[place]
    if axis is None or (axis.start, axis.length) != (0, size[axis.axis]):
        return None
    return axis.axis


def _out_axes(node: Node, contraction: Contraction) -> tuple[int | None, int]:
    """Return which axis of the weight, and of the value, the outputs of a layer are."""
    name = op_name(node)
    if name == "linear":
        return -2, -1
    if name.startswith("conv"):
        return 0, 1
    if name == "einsum":
        return None, -1
    return (-1, -1) if contraction.weight_axis in (0, -2) else (-2, -2)


def is_weight(reader: Node, node: Node) -> bool:
    """Return whether a call reads a parameter as the weight or the bias of a layer."""
    name = op_name(reader)
    if name in ("embedding", "layer_norm", "rms_norm", "native_layer_norm"):
        return True
    values = [n for n in reader.all_input_nodes if n is not node]
    contraction = contraction_of(reader, values)
    return contraction is not None and node in (contraction.weight, contraction.bias)
