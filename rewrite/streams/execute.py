"""Carry out the plan of a stream on a model: build its recipe, run it, say what changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewrite.errors import CheckpointError, PassError
from rewrite.fold.executor import run_recipes
from rewrite.fold.observed import EditedTensors, untie_config
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.observe.stream_recipe import StreamRecipe
from rewrite.outcomes import Change
from rewrite.streams.plan import Edit, StreamPlan


def recipe_of(captured: Captured, plan: StreamPlan, spec: Mapping[str, Any]) -> StreamRecipe:
    """Return what a stream is put through, and where, as plain data."""
    return StreamRecipe(
        {**spec, "size": plan.channels},
        tuple(_edit(captured, edit) for edit in plan.edits),
        tuple(plan.norms),
        tuple(plan.ones),
        dict(plan.needs),
    )


def carry_out(
    captured: Editable, plan: StreamPlan, spec: Mapping[str, Any], before: str, after: str
) -> Change:
    """Put the parameters around one stream through a map, in place, and return what changed.

    Raises:
        PassError: a tensor that would be written is not finite.
    """
    recipe = recipe_of(captured, plan, spec)
    alone = {edit.tensor for edit in plan.edits if edit.alone}
    aliases = {name for edit in recipe.edits for name in edit["aliases"]}
    try:
        run_recipes([recipe], EditedTensors(captured, alone, aliases), captured.exact)
    except CheckpointError as error:
        raise PassError(str(error), plan.target) from error
    notes = [*plan.notes]
    if alone:
        notes.append(f"{', '.join(sorted(alone))} is a tensor of its own now")
        untie_config(captured.model)
    owners = [TensorRef.of(name).owner for name in (*aliases, *plan.ones)]
    owners += [TensorRef.of(edit.tensor).owner for edit in plan.edits]
    touched = (
        *plan.writers,
        *plan.layers,
        *owners,
        *(edit.tensor for edit in plan.edits),
        *plan.ones,
    )
    return Change(
        plan.target, before, after, note="; ".join(notes),
        touched=tuple(dict.fromkeys(touched)), recipe=recipe.to_data(),
    )  # fmt: skip


def _edit(captured: Captured, edit: Edit) -> dict[str, Any]:
    tied = [] if edit.alone else captured.tied(TensorRef.of(edit.tensor))
    return {
        "tensor": edit.tensor,
        "axis": edit.axis,
        "scale": edit.scale,
        "alone": edit.alone,
        "aliases": [ref.name for ref in tied],
    }
