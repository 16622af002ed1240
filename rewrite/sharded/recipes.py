"""Which changes of passes can be run tensor by tensor, and running them.

    fold-observed    a norm into its readers         (`rewrite.observe.recipe`)
    map-stream       a stream in another basis       (`rewrite.observe.stream_recipe`)

A change is one of these if its recipe says so: a pass that anyone wrote may give the same recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from rewrite.fold.executor import TensorStore, run_recipes
from rewrite.observe.recipe import ReaderRecipe
from rewrite.observe.stream_matrices import StreamMap, stream_map
from rewrite.observe.stream_recipe import StreamRecipe

FolderRecipe = ReaderRecipe | StreamRecipe
"""What a folder can be rewritten by."""


def run(
    recipe: FolderRecipe,
    store: TensorStore,
    exact: dict[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Run one recipe on the tensors of a folder.

    Raises:
        CheckpointError: a tensor is not what the recipe relies on.
    """
    if isinstance(recipe, StreamRecipe):
        # What it relies on was asked of the folder before anything was written.
        recipe = replace(recipe, needs={})
    run_recipes([recipe], store, exact)


def unmet(recipes: Sequence[FolderRecipe], read: Callable[[str], Tensor]) -> Iterator[int]:
    """Yield the place of each recipe that relies on a weight which is not as it has to be.

    Args:
        recipes: in their order; what one makes neutral the next may rely on.
        read: returns a tensor of the folder by its name in the model.
    """
    made: dict[str, float] = {}
    for place, recipe in enumerate(recipes):
        if isinstance(recipe, ReaderRecipe):
            made |= recipe.neutral
            continue
        for name, wanted in recipe.needs.items():
            if made.get(name) != wanted and not bool((read(name) == wanted).all()):
                yield place
                break


def maps_of(recipes: Sequence[FolderRecipe]) -> list[StreamMap]:
    """Return what streams are put through, in order."""
    return [stream_map(r.map) for r in recipes if isinstance(r, StreamRecipe)]
