"""Bake weight normalization away:  w = g * v / ||v||  becomes one plain parameter again.

The weight that the layer computed is the weight that it keeps, bit for bit; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.order import in_data_flow_order
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.weight_norm import (
    has_old_weight_norm,
    remove_weight_norm,
    weight_norm_sources,
    weight_norm_step,
    weight_norm_tensors,
    weight_normed,
)
from rewrite.weights.weight_norm_recipe import NormedWeight, RemovedWeightNorm


@dataclass(frozen=True)
class RemovalPlan:
    """One layer, and for each of its normed weights the others that share its g and v."""

    module: nn.Module
    ties: dict[str, tuple[TensorRef, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoveWeightNorm(Pass):
    """Replace g and v by the weight that they make.

    Rewrites:
      1. `torch.nn.utils.parametrizations.weight_norm`, and the weight norm of this toolkit.
      2. Old-style `torch.nn.utils.weight_norm`.
      3. Tied weights once: what shared g and v shares the weight.

    Declines: a weight with another parametrization on top of the weight norm.
    """

    name: ClassVar[str] = "remove-weight-norm"
    contract: ClassVar[Contract] = Contract.EXACT

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every layer with a weight norm."""
        holders = _holders(captured)
        seen: set[tuple[str, str]] = set()
        for name, module in in_data_flow_order(captured):
            plan = RemovalPlan(module)
            for key in weight_normed(module):
                if is_parametrized(module, key) and len(module.parametrizations[key]) > 1:  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
                    yield Skip(name, _describe(module), f"{key} has a second parametrization")
                elif (name, key) not in seen:
                    together = holders[weight_norm_sources(module, key)]
                    plan.ties[key] = tuple(r for r in together if r != TensorRef(name, key))
                    seen.update((r.owner, r.attr) for r in together)
            if plan.ties:
                yield Site(name, _describe(module), plan=plan)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Bake the weights of one layer and of those tied to it."""
        plan: RemovalPlan = site.plan
        touched: list[str] = [site.target]
        keys: dict[str, str | None] = {}
        weights: list[NormedWeight | None] = []
        for key, ties in plan.ties.items():
            made = _recipe(captured, plan.module, TensorRef(site.target, key), ties)
            weights.append(made)
            if made is not None:
                g, v = weight_norm_tensors(plan.module, key)
                captured.keep_exact(made.made(g.detach(), v.detach()))
            keys |= _keys(plan.module, TensorRef(site.target, key))
            for ref in ties:
                keys |= _keys(captured.module(ref.owner), ref)
            weight = remove_weight_norm(captured.editor, plan.module, key)
            for ref in ties:
                other = captured.module(ref.owner)
                remove_weight_norm(captured.editor, other, ref.attr)
                captured.editor.share(other, ref.attr, weight)
                touched.append(ref.owner)
        after = type(plan.module).__name__
        tied = [ref.name for ties in plan.ties.values() for ref in ties]
        note = f"tied to {', '.join(tied)}" if tied else ""
        known = [weight for weight in weights if weight is not None]
        recipe = RemovedWeightNorm(site.target, tuple(known)).to_data()
        return Change(
            site.target, site.before, after, note, tuple(touched), keys,
            recipe=recipe if len(known) == len(weights) else {},
        )  # fmt: skip


def _describe(module: nn.Module) -> str:
    old = "old-style " if has_old_weight_norm(module) else ""
    return f"{type(module).__name__.removeprefix('Parametrized')} with {old}weight norm"


def _holders(captured: Captured) -> dict[tuple[int, int], list[TensorRef]]:
    """Return, per pair of g and v, the weights that they make."""
    found: dict[tuple[int, int], list[TensorRef]] = {}
    for name, module in captured.tree.modules():
        for key in weight_normed(module):
            found.setdefault(weight_norm_sources(module, key), []).append(TensorRef(name, key))
    return found


def _keys(module: nn.Module, ref: TensorRef) -> dict[str, str | None]:
    g, v = _sources(module, ref)
    return {g: None, v: ref.name}


def _sources(module: nn.Module, ref: TensorRef) -> tuple[str, str]:
    """Return the names of the magnitudes and the directions of a weight."""
    if ref.attr in has_old_weight_norm(module):
        return f"{ref.name}_g", f"{ref.name}_v"
    stem = f"{TensorRef(ref.owner, 'parametrizations').name}.{ref.attr}.original"
    return f"{stem}0", f"{stem}1"


def _recipe(
    captured: Captured, module: nn.Module, ref: TensorRef, ties: tuple[TensorRef, ...]
) -> NormedWeight | None:
    """Return where a weight and what makes it stand, under every name of them."""
    places = []
    for each in (ref, *ties):
        holder = captured.module(each.owner)
        for owner in (each.owner, *captured.aliases(each.owner)):
            place = TensorRef(owner, each.attr)
            places.append((place.name, *_sources(holder, place)))
    step = weight_norm_step(module, ref.attr)
    return NormedWeight.of(step, tuple(places))
