"""Recipes of a report run on a state dict: a fold or a swap repeated on another checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError, one_line
from rewrite.fold.executor import run_recipes
from rewrite.fold.recipes import Data, from_data
from rewrite.fold.store import StateDictStore
from rewrite.fold.swap_recipe import apply_swaps
from rewrite.init.draw_recipe import DRAWN
from rewrite.observe.recipe import KIND as OBSERVED
from rewrite.observe.stream_recipe import KIND as STREAM
from rewrite.weights.tensor_recipe import Exact
from rewrite.weights.weight_norm_keys import fit_weight_norm_keys


def apply_recipes(
    recipes: Iterable[Data], drop: Iterable[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the folded state dict of a checkpoint of the same architecture.

    Args:
        recipes: those of one pass of a report, in order.
        drop: the old keys that go.
        state: the checkpoint; it is not changed.

    Raises:
        CheckpointError: a key is missing, or the checkpoint breaks what the fold relied on.
    """
    recipes = list(recipes)
    normed = {name for recipe in recipes for name in recipe.get("weight_normed", ())}
    exact: Exact = {}
    store = StateDictStore(fit_weight_norm_keys(state, normed, exact))
    run_recipes([from_data(recipe) for recipe in recipes], store, exact or None)
    written = {f"{r['name']}.{attr}" for r in recipes if "name" in r for attr in ("weight", "bias")}
    for key in set(drop) - written:
        store.delete(key)
    return store.state


def check_tensors(changes: Iterable[Data], state: Mapping[str, Tensor]) -> None:
    """Hold the tensors that changes read to what they were in the first model: shapes and numbers.

    A tensor that is missing is told of by whoever reads it; reports of version 0.1 list no shapes.

    Raises:
        CheckpointError: a tensor has another shape, is not of floating point, or has a value that
            is not finite.
    """
    shapes: dict[str, list[int]] = {}
    finite: set[str] = set()
    for change in changes:
        held_to = change.get("shapes", {})
        shapes |= held_to
        if change["recipe"]["do"] not in _JUDGE_NUMBERS:
            finite |= held_to.keys()
    for name, shape in shapes.items():
        if name not in state:
            continue
        held = state[name]
        if not isinstance(held, Tensor):
            raise CheckpointError(f"{name} is a {type(held).__name__}, no tensor")
        if list(held.shape) != list(shape):
            got, wanted = ("x".join(map(str, s)) or "one number" for s in (held.shape, shape))
            raise CheckpointError(
                f"{name} is {got}, in the model of the report {wanted}: it is of another model"
            )
        if held.dtype not in _WEIGHTS or held.layout is not torch.strided or held.is_meta:
            kind = "meta" if held.is_meta else f"{held.dtype}, {held.layout}"
            raise CheckpointError(f"{name} holds no numbers of floating point ({kind})")
        if name in finite and not bool(held.isfinite().all()):
            raise CheckpointError(f"{name} holds values that are not finite")


_JUDGE_NUMBERS = (OBSERVED, DRAWN)
"""Recipes that say more of a number that is not finite themselves, or read no number."""

_WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def apply_report(report: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` after every pass of a report (as JSON says it).

    Raises:
        CheckpointError: a change carries no recipe (it is no fold, and no swap without data), or
            the report is damaged.
    """
    try:
        return _applied(report, state)
    except DAMAGED as error:
        raise CheckpointError(f"the report does not say how to fold: {one_line(error)}") from error


DAMAGED = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, ZeroDivisionError,
    OverflowError, RecursionError, MemoryError,
)  # fmt: skip
"""What a recipe that is not as this toolkit writes it raises; whatever it is, the report is why."""


def _applied(report: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(state)
    for part in report["passes"]:
        recipes: list[Data] = []
        swaps: list[Data] = []
        drop: list[str] = []
        moved: dict[str, str] = {}
        for change in part["changes"]:
            recipe = change.get("recipe") or {}
            if not recipe:
                raise CheckpointError(
                    f"{change['target']}: {part['pass']} leaves no recipe for other checkpoints"
                )
            if recipe["do"] == "swap":
                swaps.append(recipe)
                continue
            if recipe["do"] != "with":
                recipes.append(recipe)
            if recipe["do"] == STREAM:
                moved |= {old: new for old, new in change["keys"].items() if new is not None}
            renames = recipe["do"] == "affine"
            drop += [
                old for old, new in change["keys"].items()
                if new is None or (renames and new != old)
            ]  # fmt: skip
            # The weight that a norm computed goes with the norm.
            drop += set(recipe.get("weight_normed", ())) - set(change["keys"].values())
        check_tensors(part["changes"], result)
        result = apply_recipes(recipes, drop, apply_swaps(swaps, result))
        result = {moved.get(key, key): tensor for key, tensor in result.items()}
    return result
