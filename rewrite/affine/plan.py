"""What a plan to absorb an affine map is: one edit a layer, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.algebra import Affine
from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.layers import Layer, Side
from rewrite.affine.ledger import Ledger
from rewrite.graph.captured import TensorRef
from rewrite.graph.editor import Editor
from rewrite.graph.operators import norm_of

if TYPE_CHECKING:
    from rewrite.affine.context import AnalysisContext


@dataclass(frozen=True, eq=False)
class Edit:
    """One layer absorbs a part of the map.

    `index` holds, per channel of that side of the layer, the channel of the map (-1: none);
    `inverse` is whether it absorbs the inverse.
    """

    layer: Layer
    side: Side
    index: Tensor
    scale: bool
    shift: bool
    inverse: bool

    def alike(self, other: Edit) -> bool:
        """Return whether both edits are the same."""
        return torch.equal(other.index, self.index) and (
            (other.scale, other.shift) == (self.scale, self.shift)
        )

    @cached_property
    def whole(self) -> bool:
        """Whether each channel of the layer is the channel of that number of a map."""
        return torch.equal(self.index, torch.arange(len(self.index)))

    def affine(self, affine: Affine) -> Affine:
        """Return what the layer absorbs if the whole map is `affine`."""
        part = affine.part(self.scale, self.shift)
        part = part.inverse() if self.inverse else part
        return part if self.whole and len(part.scale) == len(self.index) else part.at(self.index)


@dataclass(frozen=True, eq=False)
class Absorption:
    """A map that layers can absorb exactly.

    Attributes:
        edits: what each layer absorbs.
        needs_positive: it holds only for positive scales.
        needs_size: what in it holds for inputs of the size of the examples, in words.
    """

    edits: tuple[Edit, ...]
    needs_positive: bool = False
    needs_size: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that absorb something, in the order in which they were reached."""
        return tuple(dict.fromkeys(edit.layer.name for edit in self.edits))

    def enter(self, ledger: Ledger, affine: Affine) -> None:
        """Note in `ledger` what each layer absorbs."""
        for edit in self.edits:
            ledger.take(edit.layer, edit.side, edit.affine(affine))


class EditSet:
    """The edits of one propagation, by layer, side and call.

    Args:
        context: the captured model.
        direction: which way the map moves; a layer that it meets against that way absorbs 1/s.
    """

    def __init__(self, context: AnalysisContext, direction: Direction) -> None:
        self._context = context
        self._direction = direction
        self._edits: dict[tuple[str, Side], dict[Node, Edit]] = {}

    def add(
        self, layer: Layer, node: Node, side: Side, value: Node, channel_map: ChannelMap
    ) -> None:
        """Let `layer`, called at `node`, absorb a map of `value` on one side.

        Raises:
            DeclinedError: it cannot.
        """
        output = side is Side.OUTPUT
        channels = layer.channels_out if output else layer.channels_in
        index = channel_map.index
        if channel_map.spread and not output and len(index) and channels % len(index) == 0:
            index = index.repeat_interleave(channels // len(index))
        elif channel_map.spread:
            raise DeclinedError(
                f"{layer.name} reads channels that a flatten repeats unknown times", node
            )
        axis = self._axis(layer, node, channel_map)
        if axis != layer.axis:
            does = "writes" if output else "reads"
            raise DeclinedError(
                f"{layer.name} {does} its channels along axis {layer.axis} (from the end), and the "
                f"map is along axis {axis}",
                node,
            )
        if layer.operands:
            index = self._of_operands(layer, node, value, channel_map)
        if len(index) != channels:
            raise DeclinedError(
                f"{layer.name} has {channels} channels where {len(index)} are mapped", node
            )
        self._check_shift(layer, node, side, channel_map.shift)
        inverse = (self._direction is Direction.FORWARD) == output
        edit = Edit(layer, side, index, channel_map.scale, channel_map.shift, inverse)
        self._edits.setdefault((layer.key, side), {})[node] = edit

    def _of_operands(
        self, layer: Layer, node: Node, value: Node, channel_map: ChannelMap
    ) -> Tensor:
        """Return the index of all groups of a layer, of which some read `value`."""
        index = torch.cat(
            [
                channel_map.index if operand is value else torch.full((size,), -1)
                for operand, size in zip(layer.operands, layer.sizes, strict=True)
            ]
        )
        before = self._edits.get((layer.key, Side.INPUT), {}).get(node)
        if before is None:
            return index
        if (before.scale, before.shift) != (channel_map.scale, channel_map.shift):
            raise DeclinedError(f"{layer.name} would have to change in two different ways", node)
        return torch.where(index < 0, before.index, index)

    def _check_shift(self, layer: Layer, node: Node, side: Side, shift: bool) -> None:
        if side is Side.INPUT:
            if layer.kind == "gain" or (shift and not layer.keeps_shift):
                raise DeclinedError(layer.why_not, node)
        elif layer.kind == "gain" and shift and layer.bias is None:
            norm = norm_of(self._context.captured, node)
            if norm is not None and norm.kind == "rms":
                raise DeclinedError(f"{layer.name} has no bias to absorb a shift", node)

    def _axis(self, layer: Layer, node: Node, channel_map: ChannelMap) -> int:
        """Return the axis of the map as the layer counts its own."""
        if channel_map.axis < 0 or layer.axis >= 0:
            return channel_map.axis
        rank = self._context.ranks.rank(node)
        if rank is None:
            raise DeclinedError(
                f"the number of axes of the output of {layer.name} is unknown without example "
                f"inputs: axis {channel_map.axis} may not be the one that it writes "
                "(pass example_inputs)",
                node,
            )
        return channel_map.axis - rank

    def collect(self) -> tuple[Edit, ...]:
        """Check that each layer changes alike at all of its calls, and return one edit each.

        Raises:
            DeclinedError: it does not, or something else reads its tensors.
        """
        return tuple(self._one(side, calls) for (_, side), calls in self._edits.items())

    def _one(self, side: Side, by_call: dict[Node, Edit]) -> Edit:
        readers = self._context.tensor_readers
        edit = next(iter(by_call.values()))
        layer = edit.layer
        if layer.key in self._context.gone:
            raise DeclinedError(
                f"the affine part of {layer.name} has been folded itself", layer.node
            )
        if not layer.absorbs:
            lacks = f"{layer.name} has no weight and bias to absorb a map"
            raise DeclinedError(layer.why_not or lacks, layer.node)
        if (reason := readers.refusal(layer)) is not None:
            raise DeclinedError(reason, layer.node)
        for call in readers.calls(layer):
            other = by_call.get(call)
            if other is None:
                raise DeclinedError(
                    f"{layer.name} is called more than once, and at {call.name} its "
                    f"{'output' if side is Side.OUTPUT else 'input'} is not normalized so "
                    "(unshare clones the layer for each call)",
                    call,
                )
            if (reason := _apart(layer, call, other.layer, edit.shift)) is not None:
                raise DeclinedError(reason, call)
            if not edit.alike(other):
                raise DeclinedError(
                    f"{layer.name} would have to change differently at {call.name}", call
                )
        return edit


def _apart(layer: Layer, call: Node, other: Layer, shift: bool) -> str | None:
    """Return why two calls of one weight are not calls of one layer, or None."""
    if layer.weight is None or call is layer.node:
        return None
    if other.bias != layer.bias:
        return f"{layer.weight.name} is read with another bias at {call.name}"
    if shift and layer.module is None and layer.bias is None:
        return (
            f"{layer.weight.name} is read at {call.name}, too, and there is no one bias to absorb "
            "a shift"
        )
    return None


def write_tensor(editor: Editor, layer: Layer, attr: str, tensor: Tensor) -> TensorRef:
    """Set a tensor of a layer; a functional call that has no bias yet gets one."""
    ref = {"weight": layer.weight, "bias": layer.bias}[attr]
    if ref is None and layer.module is not None:
        ref = TensorRef(layer.module, attr)
    if ref is None:
        return editor.set_argument(layer.node, 2, attr, tensor)
    editor.set_tensor(ref, tensor)
    return ref
