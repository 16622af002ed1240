"""Passes applied to the model of a folder, which has no numbers: what they would change, as data.

A pass decides on structure; a value that it asks for is read from the shards, as it is after the
passes before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from rewrite import registry
from rewrite.errors import OptionError, PassError
from rewrite.outcomes import Selection
from rewrite.protocol import Applied, Pass, apply_pass
from rewrite.report import PassReport
from rewrite.runtime.copying import copy_model
from rewrite.runtime.infer_inputs import has_certain_rank
from rewrite.runtime.inputs import ExampleCall
from rewrite.sharded.recipes import FolderRecipe, recipe_of


def apply_on_meta(
    pass_: Pass,
    model: nn.Module,
    selection: Selection,
    calls: Sequence[ExampleCall],
    numbers: Callable[[str], Tensor],
) -> tuple[Applied, PassReport]:
    """Apply a pass to a copy of a model on meta; a site at which it fails is left alone.

    Args:
        pass_: the pass.
        model: on the meta device; it is not changed.
        selection: which sites are wanted.
        calls: those that may be observed.
        numbers: what a tensor holds, by its name.

    Raises:
        PassError: it failed, and did not say where.
    """
    start = time.perf_counter()
    left: dict[str, str] = dict(selection.left_out)
    inputs = calls[0].inputs if calls and has_certain_rank(model) else None
    while True:
        wanted = Selection(selection.only, selection.skip, left)
        try:
            applied = apply_pass(pass_, copy_model(model), inputs, None, wanted, calls, numbers)
            break
        except PassError as error:
            if not error.target or error.target in left:
                raise
            left[error.target] = f"its change cannot be planned on a folder: {error}"
    seconds = time.perf_counter() - start
    spec, contract = registry.spec(pass_), str(pass_.contract)
    return applied, PassReport(spec, contract, applied.changes, applied.skips, seconds)


def recipes_of(applied: Applied) -> list[FolderRecipe]:
    """Return what the changes of a pass do to the tensors of a folder, one recipe each.

    Raises:
        CheckpointError: a recipe is damaged.
        OptionError: a change that cannot be run tensor by tensor.
    """
    found = []
    for change in applied.changes:
        recipe = recipe_of(change)
        if recipe is None:
            raise OptionError(
                f"{change.target}: its change cannot be run tensor by tensor; load the model and "
                "convert it in memory"
            )
        found.append(recipe)
    return found
