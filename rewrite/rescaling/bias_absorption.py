"""Absorption of high biases into the next layer, by the statistics of a batch norm; approximate.

    y = relu(γ n + β),  n ~ N(0, 1) by the norm's statistics,   c = max(0, β - 3 |γ|)
    relu(γ n + β) = relu(γ n + β - c) + c   unless γ n + β < c: about 1 value of 740
    β → β - c,      W₂ x + b₂ → W₂ x + (b₂ + W₂ c)

The range of activations shrinks by c, which helps quantization to few bits (Nagel et al. 2019,
section 4.1.3). A layer with zero padding cannot absorb a shift, and is declined.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rewrite.affine.algebra import Affine
from rewrite.affine.channel_map import Direction
from rewrite.affine.context import MapRequest
from rewrite.affine.layers import Layer, Side
from rewrite.affine.plan import Absorption, Edit
from rewrite.affine.planner import Planner
from rewrite.fold.folder import Move
from rewrite.fold.recipes import FoldRecipe
from rewrite.fold.requirements import Requirements
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Norm, activation_of, norm_of
from rewrite.outcomes import Declined

_DEVIATIONS = 3.0


_SMALLEST = 1e-6
"""Of c beside β: less is what rounding left of a bias that was absorbed before."""


@dataclass(frozen=True, eq=False)
class BiasAbsorption:
    """Biases of one batch norm that the layers behind its ReLU can absorb.

    Attributes:
        target: the name of the norm.
        before: a short description of it.
        found: the recipe, or the reason why there is none.
    """

    target: str
    before: str
    found: FoldRecipe | Declined


def bias_absorptions(captured: Captured) -> Iterator[BiasAbsorption]:
    """Yield every batch norm in front of a ReLU that has high biases, in data-flow order."""
    planner = Planner(captured)
    for node in captured.nodes():
        norm, layer = norm_of(captured, node), planner.layer(node)
        if norm is None or layer is None or layer.kind != "norm" or layer.axis >= 0:
            continue
        if norm.kind != "batch" or layer.weight is None or layer.bias is None:
            continue
        bias = captured.tensor(layer.bias).detach().double()
        gain = captured.tensor(layer.weight).detach().double().abs()
        high = (bias - _DEVIATIONS * gain).clamp(min=0)
        high = torch.where(high > _SMALLEST * bias.abs(), high, 0.0)
        if bool(high.any()):
            before = f"{int((high > 0).sum())} high biases of {len(high)}"
            yield BiasAbsorption(norm.target, before, _recipe(captured, planner, norm, layer, high))


def _recipe(
    captured: Captured, planner: Planner, norm: Norm, layer: Layer, high: torch.Tensor
) -> FoldRecipe | Declined:
    users, calls = tuple(norm.node.users), captured.call_sites(norm.node)
    behind = activation_of(captured, users[0]) if len(users) == 1 else None
    if behind is None or behind.name != "relu" or len(calls) != 1:
        return Declined("it is not read by one ReLU alone")
    readers = captured.readers(norm.node)
    if not readers.known:
        return Declined(readers.reason)
    reason = planner.context.tensor_readers.refusal(layer)
    if reason is not None:
        return Declined(reason)
    values = {call: call for call in captured.call_sites(behind.node)}
    request = MapRequest(Direction.FORWARD, values, layer.axis, len(high), scale=False)
    plan = planner.plan(request)
    if isinstance(plan, Declined):
        return plan
    own = Edit(layer, Side.OUTPUT, torch.arange(len(high)), scale=False, shift=True, inverse=True)
    edits = (own, *plan.edits)
    aliases = {
        edit.layer.name: captured.aliases(edit.layer.module)
        for edit in edits
        if edit.layer.module is not None
    }
    return FoldRecipe(
        norm.target, Affine(torch.ones_like(high), high), Requirements(scales=False),
        (Move(Absorption(edits), "shift"),), aliases,
    )  # fmt: skip
