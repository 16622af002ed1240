"""Steps run without numbers: what they touch is known before anything is written."""

from __future__ import annotations

import pytest

from rewrite.errors import CheckpointError
from rewrite.hub.folder import open_folder
from rewrite.hub.structure import structure_of
from rewrite.sharded.dry_run import ShapeStore
from rewrite.sharded.values import FolderValues
from rewrite.weights.weight_norm_recipe import AddedWeightNorm, NormedWeight, RemovedWeightNorm
from tests.sharded.conftest import Make

pytestmark = pytest.mark.filterwarnings("ignore")


def test_what_appears_and_goes_is_named_and_what_is_missing_refused(make: Make) -> None:
    structure = structure_of(open_folder(make()))
    store = ShapeStore(structure.folder, structure)
    values = FolderValues(structure.folder, structure, (), ())
    weight = NormedWeight((("lm_head.weight", "lm_head.g", "lm_head.v"),))
    touched = store.run((AddedWeightNorm("lm_head", (weight,)),), values)
    assert touched.appeared == touched.written == {"lm_head.g", "lm_head.v"}
    assert touched.gone == {"lm_head.weight"} == store.gone
    assert {name: tuple(t.shape) for name, t in store.held.items()} == {
        "lm_head.g": (64, 1), "lm_head.v": (64, 32),
    }  # fmt: skip
    # What is gone is read no more, and what comes back is there as before.
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
        store.run((AddedWeightNorm("lm_head", (weight,)),), values)
    store.run((RemovedWeightNorm("lm_head", (weight,)),), values)
    assert store.gone == {"lm_head.g", "lm_head.v"} and set(store.held) == {"lm_head.weight"}
