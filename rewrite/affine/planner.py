"""Moving a per-channel affine map y = s.x + t through the captured graph.

To remove a map between x and y, one of the two changes its meaning:

    backward    x' = s.x + t takes the place of x: what produces x absorbs (s, t)
    forward     y' = x takes the place of y = s.y' + t: what reads y absorbs (s, t)

The change spreads from value to value: each operation next to a changed value says which other
values have to change with it (`rewrite.affine.rules`), until layers absorb it
(`rewrite.affine.layers`). The result is exact for every input or it is declined; nothing is
approximated. A producer on the way forward, or another reader on the way backward, would need the
inverse map: that is declined too, unless the request
lets layers absorb an inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap, DeclinedError, Direction
from rewrite.affine.context import AnalysisContext, MapRequest
from rewrite.affine.layers import Layer
from rewrite.affine.plan import Absorption
from rewrite.affine.search import Alternatives, PropagationSearch
from rewrite.graph.captured import Captured
from rewrite.graph.operators import norm_of
from rewrite.outcomes import Declined

__all__ = ["Absorption", "MapRequest", "Planner", "plan_backward"]


_ALTERNATIVES = 12
"""Combinations of choices (which summand absorbs the shift) that are tried: a bound on the work."""


@dataclass
class Planner:
    """Plans absorptions on one captured model.

    Attributes:
        folded: nodes whose map has moved elsewhere, and the input that they pass on.
        clone_shared: a layer with several calls may absorb a map at some of them.
        bake: a layer whose weight is computed may absorb a map; it becomes a plain one.
        products: a linear call whose bias is computed may absorb a map of its input.
    """

    captured: Captured
    folded: dict[Node, Node] = field(default_factory=dict)
    clone_shared: bool = False
    bake: bool = False
    products: bool = False

    def __post_init__(self) -> None:
        self.context = AnalysisContext(
            self.captured, self.folded, self.clone_shared, self.bake, self.products
        )

    def layer(self, node: Node) -> Layer | None:
        """Return the layer that `node` calls, or None."""
        return self.context.layer(node)

    def more_than_a_layer(self, name: str) -> str | None:
        """Return why a call of a module is more than that of a plain layer, or None."""
        return self.context.tensor_readers.more_than_a_layer(name)

    def reader(self, layer: Layer, calls: tuple[Node, ...]) -> str | None:
        """Return what else reads the tensors of a norm that may go, in words, or None."""
        readers, line = self.context.tensor_readers, layer.module is None
        if (twice := readers.both(layer)) is not None:
            return twice
        for ref in (layer.weight, layer.bias, layer.mean, layer.var):
            if ref is None:
                continue
            found = readers.reader(ref, calls if line else ())
            if found := found or (readers.caller(ref) if line else None):
                return found
        return None

    def called(self, node: Node) -> str:
        """Return a call in words."""
        return self.context.rules.called(node)

    def channel_axis_of_input(self, node: Node) -> int | None:
        """Return the channel axis of an input from the end, by its rank or by what reads it."""
        rank = self.context.ranks.rank(node)
        if rank is not None:
            return 1 - rank
        axes = {layer.axis for user in node.users if (layer := self.layer(user)) is not None}
        return axes.pop() if len(axes) == 1 else None

    def plan(self, request: MapRequest) -> Absorption | Declined:
        """Plan to absorb a map; declined for the reason of the first of its alternatives."""
        seeds = {node: (value, request.side) for node, value in request.values.items()}
        channel_map = ChannelMap(
            request.axis, torch.arange(request.channels), request.scale, request.shift
        )
        first: Declined | None = None
        wanted: list[int] = []
        for _ in range(_ALTERNATIVES):
            alternatives = Alternatives(wanted)
            search = PropagationSearch(self.context, request, alternatives)
            try:
                return search.run(seeds, channel_map)
            except DeclinedError as error:
                first = first or error.declined
            wanted = alternatives.next()
            if not wanted:
                break
        assert first is not None
        return first


def plan_backward(
    captured: Captured, node: Node, positive: bool = False, planner: Planner | None = None
) -> Absorption | Declined:
    """Plan to absorb a map of the input of a norm call into whatever produces it.

    The map has one scale and shift per channel of the norm; every call of the norm is meant.

    Args:
        captured: the model.
        node: a call of a normalization.
        positive: all scales will be positive (1/sigma is), which max pooling and ReLU let pass.
        planner: to share the indexes of several plans on one captured model.
    """
    planner = planner or Planner(captured)
    norm = norm_of(captured, node)
    if norm is None or norm.num_features is None:
        return Declined(f"{node.name} is no normalization with a known number of channels", (node,))
    if norm.module is not None:
        for reason in captured.hooks(norm.module):
            return Declined(f"{norm.module} {reason}", (node,))
        if (caller := captured.unknown_caller(norm.module)) is not None:
            return Declined(caller, (node,))
    inputs = {call: call.all_input_nodes[0] for call in captured.call_sites(node)}
    return planner.plan(
        MapRequest(
            Direction.BACKWARD, inputs, norm.channel_axis, norm.num_features, positive=positive
        )
    )
