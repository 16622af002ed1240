"""Which changes of passes can be run tensor by tensor, and running them.

    fold             a map into the layers around it     (`rewrite.fold.recipes`)
    fold-observed    a norm into its readers             (`rewrite.observe.recipe`)
    map-stream       a stream in another basis           (`rewrite.observe.stream_recipe`)
    and every `TensorRecipe`: weight norms put on or taken off, weights drawn anew

A change is one of these if its recipe says so: a pass that anyone wrote may give the same recipe.
The class of a folder is told by its configuration, so a norm that a pass takes out of a model keeps
its tensors here, with the values with which it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from rewrite.affine.layers import Layer
from rewrite.fold.executor import run_recipes
from rewrite.fold.recipes import FoldRecipe, from_data
from rewrite.observe.recipe import ReaderRecipe
from rewrite.observe.stream_matrices import StreamMap, stream_map
from rewrite.observe.stream_recipe import StreamRecipe
from rewrite.outcomes import Change
from rewrite.weights.tensor_recipe import TensorRecipe, TensorStore

FolderRecipe = FoldRecipe | ReaderRecipe | StreamRecipe | TensorRecipe
"""What a folder can be rewritten by."""

Step = tuple[FolderRecipe, ...]
"""Recipes that are run together: what several maps make of one tensor is rounded once."""


def recipe_of(change: Change) -> FolderRecipe | None:
    """Return the recipe of a change for a folder; None if it cannot be run tensor by tensor.

    Raises:
        CheckpointError: it is damaged.
    """
    if not change.recipe or change.recipe.get("do") in ("with", "swap"):
        return None
    recipe = from_data(change.recipe)
    if isinstance(recipe, ReaderRecipe):
        return _reader_kept(recipe)
    if isinstance(recipe, FoldRecipe):
        return _fold_kept(recipe, change)
    return recipe if isinstance(recipe, StreamRecipe | TensorRecipe) else None


def _reader_kept(recipe: ReaderRecipe) -> ReaderRecipe:
    if not recipe.gone:
        return recipe
    neutral = {recipe.weight: (1.0 - recipe.offset) / recipe.factor}
    if recipe.bias is not None:
        neutral[recipe.bias] = 0.0
    return replace(recipe, neutral=neutral, gone=())


def _fold_kept(recipe: FoldRecipe, change: Change) -> FoldRecipe:
    """Return a fold whose batch norm stays, with statistics and weights that do nothing."""
    norm = recipe.origin
    gone = {key for key, new in change.keys.items() if new is None}
    if not isinstance(norm, Layer):
        return replace(recipe, gone=tuple(gone))
    values = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0 - norm.eps}
    held = {key: ref for key in values if (ref := getattr(norm, key)) is not None}
    neutral = {ref.name: values[key] for key, ref in held.items() if ref.name in gone}
    counts = {key for key in gone if key.endswith("num_batches_tracked")}
    rest = gone - neutral.keys() - counts
    return replace(recipe, neutral={**recipe.neutral, **neutral}, gone=tuple(rest))


def in_folder(change: Change) -> Change:
    """Return a change as a folder holds it: its norms keep their tensors, with neutral values."""
    recipe = recipe_of(change)
    if not isinstance(recipe, ReaderRecipe | FoldRecipe):
        return change
    kept = {name for name, new in change.keys.items() if new is None} & recipe.neutral.keys()
    if not kept:
        return change
    note = "; ".join(
        filter(None, [change.note, "in a folder its norm keeps values that do nothing"])
    )
    keys = {name: new for name, new in change.keys.items() if name not in kept}
    return replace(change, keys=keys, note=note, recipe=recipe.to_data())


def steps_of(recipes: Sequence[FolderRecipe]) -> list[tuple[int, ...]]:
    """Return the places of the recipes of one pass that are run together, in order."""
    folds = tuple(n for n, recipe in enumerate(recipes) if isinstance(recipe, FoldRecipe))
    rest: list[tuple[int, ...]] = [
        (n,) for n, recipe in enumerate(recipes) if not isinstance(recipe, FoldRecipe)
    ]
    return [folds, *rest] if folds else rest


def run(
    step: Step,
    store: TensorStore,
    exact: dict[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Run one step on the tensors of a folder.

    Raises:
        CheckpointError: a tensor is not what a recipe relies on.
    """
    # What a stream relies on was asked of the folder before anything was written.
    asked = [replace(r, needs={}) if isinstance(r, StreamRecipe) else r for r in step]
    run_recipes(asked, store, exact)


def constant(step: Step, name: str) -> float | None:
    """Return what a step makes of every element of a tensor; None if it is no constant."""
    found = None
    for recipe in step:
        if isinstance(recipe, ReaderRecipe | FoldRecipe):
            found = recipe.neutral.get(name, found)
        elif isinstance(recipe, StreamRecipe) and name in recipe.ones:
            found = 1.0
    return found


def unmet(step: Step, values: Callable[[str], Tensor]) -> str | None:
    """Return a tensor that a step relies on and that is not as it has to be, or None.

    Args:
        step: it.
        values: returns a tensor as it is before the step, by its name in the model.
    """
    needs = {k: v for r in step if isinstance(r, StreamRecipe) for k, v in r.needs.items()}
    return next((k for k, v in needs.items() if not bool((values(k) == v).all())), None)


def maps_of(steps: Sequence[Step]) -> list[StreamMap]:
    """Return what streams are put through, in order."""
    return [stream_map(r.map) for step in steps for r in step if isinstance(r, StreamRecipe)]


def layers_of(recipes: Sequence[FolderRecipe]) -> list[set[str]]:
    """Return the layers or tensors between which each map is moved, by name."""
    found = []
    for recipe in recipes:
        if isinstance(recipe, ReaderRecipe):
            found.append({recipe.weight, *(str(edit["weight"]) for edit in recipe.edits)})
        elif isinstance(recipe, FoldRecipe):
            origin = {recipe.origin.name} if isinstance(recipe.origin, Layer) else set()
            found.append({layer.name for layer in recipe.layers()} | origin)
    return found
