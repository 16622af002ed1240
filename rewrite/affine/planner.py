"""Moving a per-channel affine map y = s.x + t through the captured graph.

To remove a map between x and y, one of the two changes its meaning:

    backward    x' = s.x + t takes the place of x: what produces x takes up (s, t)
    forward     y' = x takes the place of y = s.y' + t: what reads y takes up (s, t)

The change spreads from value to value: each operation next to a changed value says which other
values have to change with it (`rewrite.affine.rules`), until layers take it up
(`rewrite.affine.layers`). The result is exact for every input or it is refused; nothing is
approximated. A producer on the way forward, or another reader on the way backward, would need the
inverse map: that is refused too, unless `compensate` allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError
from rewrite.affine.context import AnalysisContext
from rewrite.affine.layers import Layer
from rewrite.affine.plan import Absorption, Refusal
from rewrite.affine.search import PropagationSearch
from rewrite.graph.captured import Captured
from rewrite.graph.operators import norm_of

__all__ = ["Absorption", "Planner", "Refusal", "plan_backward", "plan_forward"]


_FORKS = 12
"""Ways tried at the forks of one growth (which summand takes the shift): a bound on the work."""


@dataclass
class Planner:
    """Plans absorptions on one captured model.

    Attributes:
        folded: nodes whose map has moved elsewhere, and the input that they pass on.
        unshare: a layer with several calls may take up a map at some of them.
        bake: a layer whose weight is computed may take up a map; it becomes a plain one.
    """

    captured: Captured
    folded: dict[Node, Node] = field(default_factory=dict)
    unshare: bool = False
    bake: bool = False

    def __post_init__(self) -> None:
        self.surroundings = AnalysisContext(self.captured, self.folded, self.unshare, self.bake)

    def layer(self, node: Node) -> Layer | None:
        """Return the layer that `node` calls, or None."""
        return self.surroundings.layer(node)

    def more_than_a_layer(self, name: str) -> str | None:
        """Return why a call of a module is more than that of a plain layer, or None."""
        return self.surroundings.tensor_readers.more_than_a_layer(name)

    def reader(self, layer: Layer, calls: tuple[Node, ...]) -> str | None:
        """Return what else reads the tensors of a norm that may go, in words, or None."""
        own = calls if layer.module is None else ()
        refs = (layer.weight, layer.bias, layer.mean, layer.var)
        found = (
            self.surroundings.tensor_readers.reader(ref, own) for ref in refs if ref is not None
        )
        return next((reader for reader in found if reader is not None), None)

    def called(self, node: Node) -> str:
        """Return a call in words."""
        return self.surroundings.rules.called(node)

    def channel_axis_of_input(self, node: Node) -> int | None:
        """Return the channel axis of an input from the end, by its rank or by what reads it."""
        rank = self.surroundings.ranks.rank(node)
        if rank is not None:
            return 1 - rank
        axes = {layer.axis for user in node.users if (layer := self.layer(user)) is not None}
        return axes.pop() if len(axes) == 1 else None

    def backward(
        self,
        inputs: Mapping[Node, Node],
        axis: int,
        channels: int,
        *,
        scale: bool = True,
        shift: bool = True,
        positive: bool = False,
        compensate: bool = False,
    ) -> Absorption | Refusal:
        """Plan to absorb a map of the input of all calls of one layer (each call to its input)."""
        seeds = {node: (value, "in front") for node, value in inputs.items()}
        return self._plan(seeds, axis, channels, -1, scale, shift, positive, compensate)

    def forward(
        self,
        nodes: Iterable[Node],
        axis: int,
        channels: int,
        *,
        scale: bool = True,
        shift: bool = True,
        positive: bool = False,
        compensate: bool = False,
    ) -> Absorption | Refusal:
        """Plan to absorb a map of the value of `nodes`, which are all calls of one layer."""
        seeds = {node: (node, "behind") for node in nodes}
        return self._plan(seeds, axis, channels, +1, scale, shift, positive, compensate)

    def _plan(
        self,
        seeds: dict[Node, tuple[Node, str]],
        axis: int,
        channels: int,
        sign: int,
        scale: bool,
        shift: bool,
        positive: bool,
        compensate: bool,
    ) -> Absorption | Refusal:
        first: Refusal | None = None
        ways: list[int] = []
        for _ in range(_FORKS):
            growth = PropagationSearch(self.surroundings, sign, positive, compensate, ways)
            try:
                lane = ChannelMap(axis, torch.arange(channels), scale, shift)
                return growth.run(seeds, lane)
            except DeclinedError as error:
                first = first or error.declined
            ways = growth.next_ways()
            if not ways:
                break
        assert first is not None
        return first


def plan_backward(
    captured: Captured, node: Node, positive: bool = False, planner: Planner | None = None
) -> Absorption | Refusal:
    """Plan to absorb a map of the input of a norm call into whatever produces it.

    The map has one scale and shift per channel of the norm; every call of the norm is meant.

    Args:
        captured: the model.
        node: a call of a normalization.
        positive: all scales will be positive (1/sigma is), which max pooling and ReLU let pass.
        planner: to share the indexes of several plans on one captured model.
    """
    return _plan_at(captured, node, positive, planner, "backward")


def plan_forward(
    captured: Captured,
    node: Node,
    positive: bool = False,
    shift: bool = True,
    planner: Planner | None = None,
) -> Absorption | Refusal:
    """Plan to absorb a map of the value of a norm call into all of its readers.

    `shift=False` plans for a map that adds nothing, which zero padding lets pass.
    """
    return _plan_at(captured, node, positive, planner, "forward", shift)


def _plan_at(
    captured: Captured,
    node: Node,
    positive: bool,
    planner: Planner | None,
    way: str,
    shift: bool = True,
) -> Absorption | Refusal:
    planner = planner or Planner(captured)
    norm = norm_of(captured, node)
    if norm is None or norm.num_features is None:
        return Refusal(f"{node.name} is no normalization with a known number of channels")
    if norm.module is not None:
        for reason in captured.hooks(norm.module):
            return Refusal(f"{norm.module} {reason}")
        if (caller := captured.unknown_caller(norm.module)) is not None:
            return Refusal(caller)
    calls = captured.call_sites(node)
    axis, channels = norm.channel_axis, norm.num_features
    if way == "backward":
        inputs = {call: call.all_input_nodes[0] for call in calls}
        return planner.backward(inputs, axis, channels, shift=shift, positive=positive)
    return planner.forward(calls, axis, channels, shift=shift, positive=positive)
