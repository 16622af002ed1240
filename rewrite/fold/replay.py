"""Recipes run on a state dict: the edits of one fold, repeated on another checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.algebra import Affine, Layout, dirac, embed
from rewrite.affine.layers import Layer
from rewrite.affine.ledger import Ledger
from rewrite.affine.plan import Absorption, Edit
from rewrite.errors import CheckpointError
from rewrite.fold.folder import SMALLEST_SCALE, Move
from rewrite.graph.captured import TensorRef
from rewrite.weights.weight_norm_keys import fit_weight_norm_keys

if TYPE_CHECKING:
    from rewrite.fold.recipes import Recipe


# --- repeating them ------------------------------------------------------------------------------


def apply_recipes(
    recipes: Iterable[Recipe], drop: Iterable[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the folded state dict of a checkpoint of the same architecture.

    Args:
        recipes: those of one report, in order.
        drop: the old keys that go.
        state: the checkpoint; it is not changed.

    Raises:
        CheckpointError: a key is missing, or the checkpoint breaks what the fold relied on.
    """
    recipes = list(recipes)
    normed = {name for recipe in recipes for name in recipe.get("weight_normed", ())}
    new = fit_weight_norm_keys(state, normed)

    def read(ref: TensorRef) -> Tensor:
        if ref.name not in new:
            if any(key.startswith(_originals_of(ref)) for key in new):
                raise CheckpointError(
                    f"{ref.name} is computed from other tensors in this checkpoint, by more than a "
                    "weight norm; convert the model instead"
                )
            raise CheckpointError(f"the checkpoint has no {ref.name}: it is of another model")
        return new[ref.name]

    ledger = Ledger(read)
    for recipe in recipes:
        if recipe["do"] == "fold":
            _replay(recipe, ledger, read)
    written: dict[str, Tensor] = {}
    aliases = _aliases(recipes)

    def write(layer: Layer, attr: str, tensor: Tensor) -> None:
        ref = {"weight": layer.weight, "bias": layer.bias}[attr]
        if ref is None and layer.module is None:
            raise CheckpointError(f"{layer.name}: the name of its new {attr} is not in the map")
        key = ref.name if ref is not None else f"{layer.module}.{attr}"
        for name in (key, *(f"{alias}.{attr}" for alias in aliases.get(layer.name, ()))):
            written[name] = tensor

    ledger.write(write)
    new.update(written)
    merged = [_merged(recipe, new) for recipe in recipes if recipe["do"] == "merge"]
    gone = set(drop)
    kept = {key: value for key, value in new.items() if key not in gone}
    for tensors in merged:
        kept.update(tensors)
    return kept


def _originals_of(ref: TensorRef) -> tuple[str, ...]:
    """Return how the keys begin that stand for a tensor which a parametrization computes."""
    return (f"{TensorRef(ref.owner, 'parametrizations').name}.{ref.attr}.", f"{ref.name}_orig")


def _aliases(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    layers = [
        edit["layer"]
        for recipe in recipes
        if recipe["do"] == "fold"
        for move in recipe["moves"]
        for edit in move["edits"]
    ]
    return {layer["name"]: layer["aliases"] for layer in layers}


def _replay(recipe: Recipe, ledger: Ledger, read: Any) -> None:
    origin = recipe["origin"]
    if "layer" in origin:
        layer = _read_layer(origin["layer"])
        affine = ledger.affine(layer)
        name = layer.name
        ledger.forget(layer)
    elif "constants" in origin:
        affine = _constants(origin["constants"], read)
        name = origin["constants"][0]["target"]
    else:
        affine = Affine(
            torch.tensor(origin["scale"], dtype=torch.float64),
            torch.tensor(origin["shift"], dtype=torch.float64),
        )
        name = "input"
    _check(recipe, affine, name)
    for move in recipe["moves"]:
        edits = tuple(_read_edit(edit) for edit in move["edits"])
        Move(Absorption(edits), move["part"]).enter(ledger, affine)


def _check(recipe: Recipe, affine: Affine, name: str) -> None:
    """Refuse a checkpoint whose numbers break what the plan relied on."""
    size = affine.scale.abs()
    inverse = any(edit["inverse"] for move in recipe["moves"] for edit in move["edits"])
    forward_only = all(
        edit["inverse"] is False for move in recipe["moves"] for edit in move["edits"]
    )
    broken = ""
    if not recipe["adds"] and bool(affine.shift.any()):
        broken = "adds something, and the mapped one did not"
    elif not recipe["scales"] and bool((affine.scale != 1).any()):
        broken = "scales, and the mapped one did not"
    elif recipe["needs_positive"] and bool((affine.scale <= 0).any()):
        broken = "has a scale that is not positive, which max pooling or ReLU does not let pass"
    elif inverse and not forward_only and bool((size < SMALLEST_SCALE).any()):
        broken = "has a scale of nearly zero, whose inverse another layer would take up"
    if broken:
        raise CheckpointError(f"{name}: this checkpoint's {broken}; convert the model instead")


def _read_layer(data: Recipe) -> Layer:
    if data["cloned"]:
        raise CheckpointError(f"{data['name']} was cloned (unshare); convert the model instead")

    def ref(key: str) -> TensorRef | None:
        if data[key] is None:
            return None
        owner, _, attr = data[key].rpartition(".")
        return TensorRef(owner, attr)

    return Layer(
        data["name"], data["kind"], cast(Node, None), data["module"], 0, 0, 0,
        Layout(data["groups"], data["transposed"]), ref("weight"), ref("bias"), ref("mean"),
        ref("var"), data["eps"],
    )  # fmt: skip


def _read_edit(data: Recipe) -> Edit:
    index = data["index"]
    positions = torch.arange(index) if isinstance(index, int) else torch.tensor(index)
    return Edit(
        _read_layer(data["layer"]), data["side"], positions, data["scale"], data["shift"],
        data["inverse"],
    )  # fmt: skip


def _constants(links: Sequence[Recipe], read: Any) -> Affine:
    result: Affine | None = None
    for link in links:
        affine = link_affine(link, read)
        result = affine if result is None else affine.after(result)
    assert result is not None
    return result


def link_affine(link: Recipe, read: Any) -> Affine:
    """Return the map of one link: a norm, a constant per channel, or a sign."""

    def tensor(key: str | None) -> Tensor | None:
        if key is None:
            return None
        owner, _, attr = key.rpartition(".")
        value: Tensor = read(TensorRef(owner, attr))
        return value

    if link["is"] == "norm":
        mean, var = tensor(link["mean"]), tensor(link["var"])
        assert mean is not None and var is not None
        return Affine.batch_norm(
            mean, var, tensor(link["weight"]), tensor(link["bias"]), link["eps"]
        )
    if link["is"] == "constant":
        value = tensor(link["key"])
        assert value is not None
        value = value.double().flatten()
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        return {
            "mul": Affine(value, zero),
            "div": Affine(value.reciprocal(), zero),
            "add": Affine(one, value),
            "sub": Affine(one, -value),
        }[link["operation"]]
    raise CheckpointError(f"{link['target']}: {link['reason']}; convert the model instead")


def _merged(recipe: Recipe, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weight and bias of merged branches, under their new keys."""
    old = state[recipe["like"]]
    kernel = torch.zeros(old.shape, dtype=torch.float64)
    bias = torch.zeros(old.shape[0], dtype=torch.float64)
    column = (-1, *(1,) * (old.dim() - 1))

    def read(ref: TensorRef) -> Tensor:
        return state[ref.name]

    for term in recipe["terms"]:
        affine = Affine.identity(old.shape[0])
        for link in term["links"]:
            if link["is"] == "negative":
                affine = Affine(-affine.scale, -affine.shift)
            else:
                affine = link_affine(link, read).after(affine)
        if term["weight"] is None:
            part = dirac(old.shape[0], recipe["groups"], old.shape[2:], term["at"])
        else:
            part = embed(state[term["weight"]].double(), old.shape[2:], term["at"])
            if term["bias"] in state:
                bias += affine.scale * state[term["bias"]].double()
        kernel += affine.scale.view(column) * part
        bias += affine.shift
    return {
        f"{recipe['name']}.weight": torch.empty_like(old).copy_(kernel),
        f"{recipe['name']}.bias": bias.to(old.dtype),
    }


def apply_report(report: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` after every pass of a report (as JSON says it).

    Raises:
        CheckpointError: a change of the report carries no recipe: it is no fold.
    """
    result = dict(state)
    for item in report["passes"]:
        recipes: list[Recipe] = []
        drop: list[str] = []
        for change in item["changes"]:
            recipe = change.get("recipe") or {}
            if not recipe:
                raise CheckpointError(
                    f"{change['target']}: {item['pass']} leaves no recipe for other checkpoints"
                )
            if recipe["do"] != "with":
                recipes.append(recipe)
            drop += [old for old, new in change["keys"].items() if new is None]
        result = apply_recipes(recipes, drop, result)
    return result
