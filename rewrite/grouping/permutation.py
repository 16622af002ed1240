"""Channels in another order: an exact rewrite of the weights around an inner value.

    y = W₂ f(n(W₁ x + b₁)) + b₂   and a permutation P of the channels between the two layers

    W₁ ← P W₁,  b₁ ← P b₁,  γ, β of n and depthwise kernels ← their rows permuted,  W₂ ← W₂ Pᵀ

Every operation between works channel by channel and so does not notice. The order belongs to all
values that meet in a sum or a product or that such an operation links: all of a residual stream has
one. It can change only if everything that writes or reads any of these values is known; a value
that is returned, concatenated, split or read by a layer with groups of its own keeps its order.

What does notice is a norm that treats groups of channels alike: changing which channels share a
group is what this is for (`rewrite.grouping.regroup`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError
from rewrite.affine.context import AnalysisContext
from rewrite.affine.laws import Constraints
from rewrite.affine.layers import Layer, Side
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.operators import activation_of, norm_of
from rewrite.graph.traits import Trait, has, named
from rewrite.outcomes import Declined

_VALUES = 1000
"""Values that may share one order: a bound on the work."""


@dataclass(frozen=True, eq=False)
class TensorAxis:
    """One axis of one tensor that holds the channels.

    Attributes:
        index: the channel of each position.
        side: what the tensor's layer does to the value: it computes it from all its inputs, it
            computes all its outputs from it, or it works on each channel alone.
    """

    ref: TensorRef
    axis: int
    index: Tensor
    side: Literal["writes", "reads", "along"]


@dataclass(frozen=True)
class Order:
    """Everything that shares one order of channels.

    Attributes:
        channels: how many there are.
        rows: the tensors that change with the order.
        layers: the layers that hold them, by name.
        norms: the names of the modules of norms whose input and output have this order.
        linear: whether there is nothing but dense layers, norms and sums, so that the norms alone
            know one channel from a mixture of channels.
    """

    channels: int
    rows: tuple[TensorAxis, ...]
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    linear: bool = False

    def apply(self, captured: Editable, order: Tensor) -> None:
        """Put channel `order[k]` where channel k was, in every tensor."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        for row in self.rows:
            positions = torch.argsort(place[row.index], stable=True)
            old = captured.tensor(row.ref).detach()
            new = old.index_select(row.axis, positions.to(old.device))
            captured.editor.set_tensor(row.ref, new)


def order_of(context: AnalysisContext, norm: Node, ours: Collection[nn.Module]) -> Order | Declined:
    """Return what shares the order of the channels of a norm's input, or why it has to stay.

    Args:
        context: the captured model.
        norm: a call of the norm.
        ours: norms that the caller adapts to another order; another group norm is a refusal.
    """
    try:
        return _Closure(context, ours).run(norm)
    except DeclinedError as error:
        return error.declined


@dataclass(eq=False)
class _Closure:
    context: AnalysisContext
    ours: Collection[nn.Module]
    channel_maps: dict[Node, ChannelMap] = field(default_factory=dict)
    rows: dict[tuple[str, int], TensorAxis] = field(default_factory=dict)
    layers: dict[str, None] = field(default_factory=dict)
    norms: dict[str, None] = field(default_factory=dict)
    passed: dict[Node, frozenset[Node]] = field(default_factory=dict)
    near: deque[tuple[Node, Node]] = field(default_factory=deque)
    linear: bool = True

    @property
    def captured(self) -> Captured:
        return self.context.captured

    def run(self, node: Node) -> Order:
        norm = norm_of(self.captured, node)
        if norm is None or norm.num_features is None:
            raise DeclinedError(f"{node.name} is no norm with a known number of channels")
        channels = norm.num_features
        axis = self.context.ranks.from_end(norm.input, norm.channel_axis)
        channel_map = ChannelMap(axis, torch.arange(channels), scale=True, shift=False)
        self.change(norm.input, channel_map)
        while self.near:
            self.visit(*self.near.popleft())
        return Order(
            channels, tuple(self.rows.values()), tuple(self.layers), tuple(self.norms), self.linear
        )

    def change(self, value: Node, channel_map: ChannelMap) -> None:
        held = self.channel_maps.get(value)
        if held is not None:
            if not held.same(channel_map):
                raise DeclinedError(f"{value.name} would have two orders")
            return
        if channel_map.axis >= 0 or not _in_blocks(channel_map.index):
            raise DeclinedError(
                f"how the channels lie in {value.name} is unknown, or they are a part"
            )
        if len(self.channel_maps) >= _VALUES:
            raise DeclinedError(f"more than {_VALUES} values share the order")
        readers = self.captured.readers(value)
        if not readers.known:
            raise DeclinedError(
                f"the output of {self.context.rules.called(value)} has readers that were not "
                f"traced: {readers.reason}"
            )
        self.channel_maps[value] = channel_map
        self.near.append((value, value))
        self.near.extend((reader, value) for reader in value.users)

    def visit(self, node: Node, value: Node) -> None:
        """Follow the order from a value through the node that writes it or one that reads it."""
        channel_map = self.channel_maps[value]
        output = value is node
        if not output and self.context.rules.reads_only_shape(node, value):
            return
        layer = self.context.layer(node)
        if layer is not None:
            if node.all_input_nodes[0] is not value and not output:
                raise DeclinedError(
                    f"{layer.name} reads {value.name} as something else than its input"
                )
            self.at_layer(layer, node, channel_map, Side.OUTPUT if output else Side.INPUT)
            return
        if node.op in ("placeholder", "get_attr", "output"):
            raise DeclinedError(f"it reaches {self.context.rules.called(node)}")
        if value not in self.passed.get(node, ()):
            demands = self.around_operation(node, value, channel_map)
            self.passed[node] = frozenset((value, *demands))
            for other, needed in demands.items():
                self.change(other, needed)

    def around_operation(
        self, node: Node, value: Node, channel_map: ChannelMap
    ) -> dict[Node, ChannelMap]:
        # Stochastic depth scales whole samples, all channels alike.
        whole = has(node, Trait.ADDS) or named(node, "stochastic_depth")
        self.linear &= whole or self.is_a(node, nn.Identity)
        if has(node, Trait.ADDS) or has(node, Trait.MULTIPLIES):
            return self.pairwise(node, channel_map)
        activation = activation_of(self.captured, node)
        if activation is not None and activation.by_value:
            return {activation.input: channel_map, node: channel_map}
        if named(node, "prelu") or self.is_a(node, nn.PReLU):
            raise DeclinedError(
                f"{self.context.rules.called(node)} may have a slope for each channel"
            )
        # What passes any positive scales of the channels works channel by channel.
        return self.context.rules.around(node, value, channel_map, Constraints(True, lambda _: 0))

    def is_a(self, node: Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(self.captured.module(str(node.target)), kind)

    def pairwise(self, node: Node, channel_map: ChannelMap) -> dict[Node, ChannelMap]:
        ranks = self.context.ranks
        demands = {node: channel_map}
        for operand in node.all_input_nodes:
            if operand.op == "get_attr":
                raise DeclinedError(
                    f"{self.context.rules.called(node)} reads the constant {operand.name}"
                )
            if ranks.rank(operand) is None or ranks.rank(operand) != ranks.rank(node):
                raise DeclinedError(
                    f"{self.context.rules.called(node)} may broadcast {operand.name}"
                )
            demands[operand] = channel_map
        return demands

    # -- layers -------------------------------------------------------------------------------

    def at_layer(self, layer: Layer, node: Node, channel_map: ChannelMap, side: Side) -> None:
        if (reason := self.context.tensor_readers.refusal(layer)) is not None:
            raise DeclinedError(reason)
        if len(self.context.tensor_readers.calls(layer)) != 1:
            raise DeclinedError(f"{layer.name} is called more than once")
        if layer.axis != channel_map.axis:
            raise DeclinedError(f"{layer.name} has its channels along another axis")
        into, out = layer.channels_in, layer.channels_out
        if channel_map.spread and side is Side.INPUT and into % len(channel_map.index) == 0:
            channel_map = channel_map.moved(
                channel_map.axis,
                channel_map.index.repeat_interleave(into // len(channel_map.index)),
            )
        if len(channel_map.index) != (out if side is Side.OUTPUT else into):
            raise DeclinedError(f"{layer.name} has another number of channels")
        self.layers[layer.name] = None
        if layer.kind != "kernel":
            self.at_norm(layer, node, channel_map)
            return
        assert layer.weight is not None
        layout = layer.layout
        if layout.groups == 1:
            output = side is Side.OUTPUT
            does: Literal["writes", "reads"] = "writes" if output else "reads"
            self.linear &= not channel_map.spread
            self.row(layer.weight, int(output == layout.transposed), channel_map, does)
            if output and layer.bias is not None:
                self.row(layer.bias, 0, channel_map, does)
            return
        if not layout.groups == into == out:
            raise DeclinedError(f"{layer.name} has groups of channels of its own")
        self.linear = False
        for ref in (layer.weight, layer.bias):
            if ref is not None:
                self.row(ref, 0, channel_map, "along")
        self.through(node, channel_map)

    def at_norm(self, layer: Layer, node: Node, channel_map: ChannelMap) -> None:
        norm = norm_of(self.captured, node)
        assert norm is not None
        module = None if norm.module is None else self.captured.module(norm.module)
        if layer.kind == "gain" and not any(module is one for one in self.ours):
            raise DeclinedError(layer.why_not)
        if norm.module is not None:
            self.norms[norm.module] = None
        for ref in (layer.weight, layer.bias, layer.mean, layer.var):
            if ref is not None:
                self.row(ref, 0, channel_map, "along")
        self.through(node, channel_map)

    def through(self, node: Node, channel_map: ChannelMap) -> None:
        self.change(node, channel_map)
        self.change(node.all_input_nodes[0], channel_map)

    def row(
        self,
        ref: TensorRef,
        axis: int,
        channel_map: ChannelMap,
        side: Literal["writes", "reads", "along"],
    ) -> None:
        self.rows[(ref.name, axis)] = TensorAxis(ref, axis, channel_map.index, side)


def _in_blocks(index: Tensor) -> bool:
    """Return whether each channel stands for equally many neighbouring positions, in order."""
    channels = int(index.max()) + 1 if len(index) else 0
    if channels == 0 or len(index) % channels:
        return False
    wanted = torch.arange(channels).repeat_interleave(len(index) // channels)
    return torch.equal(index, wanted)
