"""Fold a norm whose readers were found by observed calls: its recipe, run by the one executor."""

from __future__ import annotations

from rewrite.errors import CheckpointError, PassError
from rewrite.fold.executor import run_recipes
from rewrite.graph.editable import Editable
from rewrite.observe.execute import ObservedStore, finish, recipe_of
from rewrite.observe.plan import ObservedFold
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
        run_recipes([recipe], ObservedStore(captured, fold, recipe), captured.exact)
    except CheckpointError as error:
        raise PassError(f"fold: {error}", fold.target) from error
    return finish(captured, fold, before, recipe)
