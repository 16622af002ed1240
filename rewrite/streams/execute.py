"""Carry out the plan of a stream on a model: build its recipe, run it, say what changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rewrite.fold.observed import ref_of, untie_config, write_tensor
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change
from rewrite.streams.plan import Edit, StreamPlan
from rewrite.streams.recipe import run_stream_recipe


def recipe_of(captured: Captured, plan: StreamPlan, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stream is put through, and where, as plain data."""
    return {
        "do": "map-stream",
        "map": {**spec, "size": plan.channels},
        "edits": [_edit(captured, edit) for edit in plan.edits],
        "norms": list(plan.norms),
        "ones": list(plan.ones),
        "needs": dict(plan.needs),
    }


def carry_out(
    captured: Editable, plan: StreamPlan, spec: Mapping[str, Any], before: str, after: str
) -> Change:
    """Put the parameters around one stream through a map, in place, and return what changed."""
    recipe = recipe_of(captured, plan, spec)
    alone = {edit.tensor for edit in plan.edits if edit.alone}
    aliases = {name for edit in recipe["edits"] for name in edit["aliases"]}

    def read(name: str) -> Tensor:
        return captured.tensor(ref_of(name))

    def write(name: str, tensor: Tensor) -> None:
        if name not in aliases:  # those are written together with the first name
            write_tensor(captured, name, tensor, alone=name in alone)

    run_stream_recipe(recipe, read, write, captured.exact)
    notes = [*plan.notes]
    if alone:
        notes.append(f"{', '.join(sorted(alone))} is a tensor of its own now")
        untie_config(captured.model)
    owners = [ref_of(name).owner for name in (*aliases, *plan.ones)]
    owners += [ref_of(edit.tensor).owner for edit in plan.edits]
    touched = (
        *plan.writers,
        *plan.layers,
        *owners,
        *(edit.tensor for edit in plan.edits),
        *plan.ones,
    )
    return Change(
        plan.target, before, after, note="; ".join(notes),
        touched=tuple(dict.fromkeys(touched)), recipe=recipe,
    )  # fmt: skip


def _edit(captured: Captured, edit: Edit) -> dict[str, Any]:
    tied = [] if edit.alone else captured.tied(ref_of(edit.tensor))
    return {
        "tensor": edit.tensor,
        "axis": edit.axis,
        "scale": edit.scale,
        "alone": edit.alone,
        "aliases": [ref.name for ref in tied],
    }
