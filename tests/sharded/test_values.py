"""Values of a folder as they are after the passes before: each sees what the last one made."""

from __future__ import annotations

import pytest
import torch

import rewrite
from rewrite.hub.folder import open_folder
from rewrite.hub.structure import structure_of
from rewrite.observe.recipe import ReaderRecipe
from rewrite.sharded.plan import plan_folder
from rewrite.sharded.values import FolderValues
from tests.sharded.conftest import Make, logits

pytestmark = pytest.mark.filterwarnings("ignore")


def test_they_are_those_of_the_folder_and_then_those_of_the_steps(make: Make) -> None:
    source = make()
    structure = structure_of(open_folder(source))
    plan = plan_folder(structure.folder, structure, "fold")
    (place,) = (
        n for n, (r,) in enumerate(plan.steps)
        if isinstance(r, ReaderRecipe) and r.weight == "model.layers.0.input_layernorm.weight"
    )  # fmt: skip
    norm, query = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    written = [frozenset({norm, query})]
    after = FolderValues(structure.folder, structure, [plan.steps[place]], written)
    before = FolderValues(structure.folder, structure, [], [])
    assert bool((after(norm) == 1).all()) and not bool((before(norm) == 1).all())
    exact = before(query).double() * before(norm).double()
    assert torch.equal(after(query), exact.float())
    # What no step writes is the folder's.
    assert torch.equal(after("model.norm.weight"), before("model.norm.weight"))


def test_a_fold_behind_a_fold_finds_nothing_left_to_scale(make: Make) -> None:
    source = make()
    once, twice = source.with_name("once"), source.with_name("twice")
    rewrite.convert_checkpoint(source, once, "fold", verify=False)
    rewrite.convert_checkpoint(source, twice, ["fold", "fold"], verify=False)
    assert torch.equal(logits(once), logits(twice))


def test_a_draw_behind_a_fold_draws_over_it(make: Make) -> None:
    source = make()
    drawn, both = source.with_name("drawn"), source.with_name("both")
    rewrite.convert_checkpoint(source, drawn, "reinit", verify=False)
    rewrite.convert_checkpoint(source, both, ["fold", "reinit"])
    assert torch.equal(logits(drawn), logits(both))
