"""A norm swap as data, run on another checkpoint: its statistics move, its γ is scaled.

    layers that absorb     (1/σ, −μ/σ), as a fold does it
    a map in front         weight = 1/σ, bias = −μ/σ
    the new norm           γ g, β       g = √(1 + B²) for anchor B

Which layers absorb, where a map stands and B are of the first conversion; μ, σ, γ, β are those of
the checkpoint. A fit to data is none of that: it has no recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine
from rewrite.affine.ledger import Ledger
from rewrite.affine.plan import Absorption, Edit
from rewrite.errors import CheckpointError
from rewrite.fold.executor import names_of, set_finite
from rewrite.fold.recipes import Data, edit_data, edit_from
from rewrite.fold.requirements import broken_statistics
from rewrite.fold.store import StateDictStore
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Norm


def swap_data(
    captured: Captured, norm: Norm, absorption: Absorption | None, *, prefix: bool
) -> dict[str, Any]:
    """Return what of a swap is known before it is made; the rest is added by `with_norm`.

    Args:
        captured: the model, with the old norm.
        norm: the old norm.
        absorption: the layers that absorb its statistics.
        prefix: whether a map stands in front of the new norm instead.

    Returns:
        An empty dict where that is not enough: tensors of several modules, a layer that was cloned.
    """
    refs = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    owners = {ref.owner for ref in refs if ref is not None}
    if len(owners) != 1 or not (owner := next(iter(owners))):
        return {}
    if absorption is not None and any(edit.layer.call is not None for edit in absorption.edits):
        return {}
    aliases = {
        edit.layer.name: captured.aliases(edit.layer.module)
        for edit in (absorption.edits if absorption is not None else ())
        if edit.layer.module is not None
    }
    names = ("weight", "bias", "mean", "var")
    return {
        "do": "swap",
        "names": [owner, *captured.aliases(owner)],
        "tensors": {
            key: None if ref is None else ref.attr for key, ref in zip(names, refs, strict=True)
        },
        "eps": norm.eps,
        "edits": [edit_data(e, aliases) for e in absorption.edits] if absorption else [],
        "prefix": prefix,
    }


def with_norm(data: Data, name: str, gain: float, *, reset: bool) -> dict[str, Any]:
    """Return the data of a swap with its new norm.

    Args:
        data: what `swap_data` returned.
        name: the name of what stands in the place of the old norm.
        gain: what γ is multiplied by.
        reset: whether γ and β are fresh.

    Returns:
        An empty dict where the new norm stands beside the module that held the old one's tensors.
    """
    if not data or not f"{name}.".startswith(f"{data['names'][0]}."):
        return {}
    below = name.removeprefix(data["names"][0]).removeprefix(".")
    return {**data, "below": below, "gain": gain, "reset": reset}


def bounded(affine: Affine) -> Affine:
    """Return `affine` with the identity where a channel's variance and eps are both zero."""
    good = torch.isfinite(affine.scale) & torch.isfinite(affine.shift)
    return Affine(torch.where(good, affine.scale, 1.0), torch.where(good, affine.shift, 0.0))


def apply_swaps(recipes: Iterable[Data], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a swapped model from one of the model before.

    Args:
        recipes: those of one pass of a report, in order.
        state: the checkpoint; it is not changed.

    Raises:
        CheckpointError: a key is missing, or a value does not fit its dtype.
    """
    recipes = list(recipes)
    store = StateDictStore(state)
    ledger = Ledger(lambda ref: store.get(ref.name), keeps_zero_bias=True)
    aliases: dict[str, tuple[str, ...]] = {}
    maps: list[Affine | None] = []
    try:
        for recipe in recipes:
            maps.append(_statistics(recipe, store))
            for one in recipe["edits"]:
                edit = edit_from(one)
                aliases[edit.layer.name] = tuple(one["layer"]["aliases"])
                _take(ledger, edit, maps[-1])
        for layer in ledger.layers():
            for attr, tensor in ledger.new_tensors(layer).items():
                for name in names_of(layer, attr, aliases[layer.name]):
                    set_finite(store, name, tensor)
        for recipe, affine in zip(recipes, maps, strict=True):
            _exchange(recipe, affine, store)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the report holds a recipe that is incomplete: {error}") from error
    return store.state


def _take(ledger: Ledger, edit: Edit, affine: Affine | None) -> None:
    if affine is None:
        raise CheckpointError(f"{edit.layer.name} absorbs statistics that the recipe does not name")
    ledger.take(edit.layer, edit.side, edit.affine(affine))


def _statistics(recipe: Data, store: StateDictStore) -> Affine | None:
    """Return (1/σ, −μ/σ) of a norm of this checkpoint; None where it keeps none."""
    name, held = recipe["names"][0], recipe["tensors"]
    if held["mean"] is None or held["var"] is None:
        return None
    names = f"{name}.{held['mean']}", f"{name}.{held['var']}"
    mean, var = map(store.get, names)
    if recipe["edits"] or recipe["prefix"]:
        reason = broken_statistics((names[0], mean), (names[1], var), recipe["eps"])
        if reason:
            raise CheckpointError(f"{name}: {reason}; convert the model instead")
    return bounded(Affine.batch_norm(mean, var, None, None, recipe["eps"]))


def _exchange(recipe: Data, affine: Affine | None, store: StateDictStore) -> None:
    """Put the tensors of the new norm in the place of those of the old one."""
    first, held = recipe["names"][0], recipe["tensors"]
    weight, bias = (
        None if held[key] is None else store.get(f"{first}.{held[key]}")
        for key in ("weight", "bias")
    )
    like = next((t for t in (weight, bias) if t is not None), None)
    if like is None and held["mean"] is not None:
        like = store.get(f"{first}.{held['mean']}")
    new: dict[str, Tensor] = {}
    place = f"{recipe['below']}." if recipe["below"] else ""
    stem = "norm." if recipe["prefix"] else ""
    if recipe["prefix"] and affine is not None and like is not None:
        new["affine.weight"], new["affine.bias"] = affine.scale.to(like), affine.shift.to(like)
    if recipe["reset"]:
        weight = None if weight is None else torch.ones_like(weight)
        bias = None if bias is None else torch.zeros_like(bias)
    if recipe["gain"] != 1:
        assert like is not None
        gamma = torch.ones_like(like).double() if weight is None else weight.detach().double()
        weight = (gamma * recipe["gain"]).to(like)
    new |= {f"{stem}{key}": t for key, t in (("weight", weight), ("bias", bias)) if t is not None}
    for name in recipe["names"]:
        for attr in (*filter(None, held.values()), "num_batches_tracked"):
            store.delete(f"{name}.{attr}")
        for key, tensor in new.items():
            set_finite(store, f"{name}.{place}{key}", tensor)
