"""Fold a norm whose readers observed calls show: its recipe, its tensors, and what changed."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from rewrite.errors import CheckpointError, PassError
from rewrite.fold.executor import run_recipes
from rewrite.fold.unfolded import drop_affine_part
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.operators import needs_weight
from rewrite.graph.spellings import is_plain
from rewrite.observe.plan import ObservedFold, ReaderEdit, _ranges
from rewrite.observe.recipe import ReaderRecipe
from rewrite.outcomes import Change


def carry_out(captured: Editable, fold: ObservedFold, before: str) -> Change:
    """Fold one norm of the model in place and return what changed.

    Args:
        captured: the model.
        fold: the norm, as it was decided.
        before: what stands there now, for the report.

    Raises:
        PassError: a tensor that would be written is not finite.
    """
    recipe = recipe_of(captured, fold)
    try:
        run_recipes([recipe], _store(captured, fold, recipe), captured.exact)
    except CheckpointError as error:
        raise PassError(f"fold: {error}", fold.target) from error
    return _finish(captured, fold, before, recipe)


def _store(captured: Editable, fold: ObservedFold, recipe: ReaderRecipe) -> EditedTensors:
    untied = {edit.untied for edit in fold.edits if edit.untied}
    return EditedTensors(captured, untied, {n for e in recipe.edits for n in e["aliases"]})


class EditedTensors:
    """The tensors of a model for recipes on observed calls, written by its editor.

    Args:
        captured: the model.
        alone: names under which a tensor becomes one of its own, where several modules hold it.
        aliases: names that are written with another one of the same tensor.
    """

    def __init__(self, captured: Editable, alone: Set[str], aliases: Set[str]) -> None:
        self._captured, self._alone, self._aliases = captured, alone, aliases

    def get(self, name: str) -> Tensor:
        """Return a tensor of the model."""
        return self._captured.tensor(TensorRef.of(name))

    def set(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in; one that several modules hold is written with the first name of them."""
        if name not in self._aliases:
            write_tensor(self._captured, name, tensor, alone=name in self._alone)

    def delete(self, name: str) -> None:
        """Do nothing: a tensor goes with the norm that it belongs to."""


def recipe_of(captured: Captured, fold: ObservedFold) -> ReaderRecipe:
    """Return what an observed fold does, as data."""
    gone = _may_go(captured, fold)
    neutral = {fold.weight.tensor: (1.0 - fold.weight.offset) / fold.weight.factor}
    if fold.bias is not None:
        neutral[fold.bias] = 0.0
    return ReaderRecipe(
        fold.weight.tensor, fold.weight.factor, fold.weight.offset, fold.bias,
        tuple(_edit(captured, edit) for edit in fold.edits),
        {} if gone else neutral, tuple(neutral) if gone else (),
    )  # fmt: skip


def _finish(captured: Editable, fold: ObservedFold, before: str, recipe: ReaderRecipe) -> Change:
    """Take out what the norm does without, once the recipe has been run; say what changed."""
    if recipe.gone:
        drop_affine_part(captured, fold.target)
    notes = [*fold.notes]
    if not recipe.gone:
        what = "the module around it" if needs_weight(captured, fold.target) else "its class"
        notes.append(f"{what} needs a weight: it stays, and does nothing")
    if untied := {edit.untied for edit in fold.edits if edit.untied}:
        notes.append(f"{', '.join(sorted(untied))} is a tensor of its own now")
        untie_config(captured.model)
    keys: dict[str, str | None] = dict.fromkeys(recipe.gone)
    for name in list(keys):
        owner, _, attr = name.rpartition(".")
        keys.update({f"{alias}.{attr}": None for alias in captured.aliases(owner)})
    owners = [TensorRef.of(edit.read.tensor).owner for edit in fold.edits]
    return Change(
        fold.target, before, f"its affine part folded into {', '.join(fold.layers)}",
        note="; ".join(notes), touched=(*fold.layers, *owners), keys=keys,
        recipe=recipe.to_data(),
    )  # fmt: skip


def _edit(captured: Captured, edit: ReaderEdit) -> dict[str, Any]:
    read = edit.read
    shape = captured.tensor(TensorRef.of(read.tensor)).shape
    parts = _ranges(read.operand.part(read.axis), shape)
    channels: int | list[int] = list(read.channels)
    if read.channels == tuple(range(len(read.channels))):
        channels = len(read.channels)
    bias_part = None
    if edit.has_bias and read.bias is not None:
        held = read.bias[1].part(-1)
        bias_part = [held[0].start, held[0].length] if held else None
    tied = captured.tied(TensorRef.of(read.tensor))
    return {
        "weight": read.tensor,
        "axis": read.axis,
        "channels": channels,
        "parts": [list(part) for part in parts],
        "bias": edit.bias,
        "has_bias": edit.has_bias,
        "bias_part": bias_part,
        "shifts": edit.bias is not None,
        "into": edit.untied or read.tensor,
        "aliases": [] if edit.untied else [ref.name for ref in tied],
    }


def write_tensor(captured: Editable, name: str, tensor: Tensor, alone: bool) -> None:
    """Set a tensor in every place that holds it, as one; or in one place alone."""
    ref = TensorRef.of(name)
    old = getattr(captured.module(ref.owner), ref.attr, None)
    others = () if alone or old is None else captured.tied(ref)
    captured.editor.set_tensor(ref, tensor)
    new = captured.module(ref.owner)._parameters.get(ref.attr)
    for other in others:
        module = captured.module(other.owner)
        if new is not None and module._parameters.get(other.attr) is old:
            captured.editor.share(module, other.attr, new)


def _may_go(captured: Captured, fold: ObservedFold) -> bool:
    """Return whether the norm's class can do without a weight."""
    module = captured.module(fold.target)
    plain = isinstance(module, nn.LayerNorm | nn.RMSNorm) and is_plain(module)
    return plain and not needs_weight(captured, fold.target)


def untie_config(model: nn.Module) -> None:
    """Tell the model's configuration that its head has a weight of its own."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
