"""Changes of streams taken back on a state dict, by what the report says of them alone.

    (T M) M' = T        turned back: the matrix is drawn anew from its kind, size and seed
    LN(C x) = LN(x)     centred tensors stay: what centring took, no LayerNorm of the stream reads

The last change is taken back first, until one that leaves no way back (a fold): it stays with all
before it, and computes what it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError, one_line
from rewrite.fold.executor import run_recipes
from rewrite.fold.recipes import Data
from rewrite.fold.replay import DAMAGED, check_tensors
from rewrite.fold.store import StateDictStore
from rewrite.observe.stream_recipe import KIND, StreamRecipe


@dataclass(frozen=True)
class Undone:
    """A state dict as it was before, and what could not be brought back, one line each."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]


def undo_report(report: Mapping[str, Any], state: Mapping[str, Tensor]) -> Undone:
    """Take back what a report (as JSON says it) did to the streams of a model.

    Args:
        report: of the conversion that made the checkpoint.
        state: the checkpoint; it is not changed.

    Raises:
        CheckpointError: the last change is none of a stream, a tensor is missing or of another
            shape, or the report is damaged.
    """
    try:
        return _undone(report, state)
    except DAMAGED as error:
        raise CheckpointError(f"the report does not say how to undo: {one_line(error)}") from error


def _undone(report: Mapping[str, Any], state: Mapping[str, Tensor]) -> Undone:
    changes = [(part["pass"], change) for part in report["passes"] for change in part["changes"]]
    if not changes:
        raise CheckpointError("the report lists no change: there is nothing to undo")
    result, notes = dict(state), []
    for number, (spec, change) in enumerate(reversed(changes)):
        if (change.get("recipe") or {}).get("do") != KIND:
            if number == 0:
                raise CheckpointError(f"{change['target']}: {spec} leaves no way back")
            notes.append(f"what {spec} did stays: it leaves no way back, and computes the same")
            break
        recipe = StreamRecipe.from_data(change["recipe"])
        result = _before(recipe, change, result)
        notes += _lost(recipe, change["target"])
    return Undone(result, tuple(notes))


def _before(recipe: StreamRecipe, change: Data, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as it was before one change of a stream, but for what that took."""
    moved = {new: old for old, new in change["keys"].items() if new is not None}
    result = {moved.get(name, name): tensor for name, tensor in state.items()}
    like = StateDictStore(result).get(recipe.edits[0]["tensor"])
    for name, new in change["keys"].items():
        if new is None and name not in result:  # the bias of a LayerNorm, which was zero
            result[name] = torch.zeros(recipe.map["size"], dtype=like.dtype, device=like.device)
    check_tensors([change], result)
    if recipe.map["kind"] == "centre":
        return result
    store = StateDictStore(result)
    run_recipes([recipe.inverse()], store)
    # A checkpoint may hold a shared tensor under one of its names.
    return {name: tensor for name, tensor in store.state.items() if name in result}


def _lost(recipe: StreamRecipe, target: str) -> list[str]:
    """Return what undoing a change of a stream does not bring back."""
    lost = []
    if recipe.map["kind"] == "centre":
        count = len(recipe.edits)
        lost.append(
            f"{target}: the mean that centring took from {count} tensors cannot be brought back; "
            "the LayerNorms of the stream take it away anyway"
        )
    if scales := [edit["scale"] for edit in recipe.edits if edit["scale"] is not None]:
        lost.append(f"{', '.join(scales)}: ones now, since what they held is in their writers")
    if alone := [edit["tensor"] for edit in recipe.edits if edit["alone"]]:
        lost.append(f"{', '.join(alone)}: shared with another layer before, its own tensor now")
    return lost
