"""rewrite.weights.constant_recipe: a new tensor of one number, once."""

from __future__ import annotations

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.fold.recipes import from_data
from rewrite.fold.store import StateDictStore
from rewrite.weights.constant_recipe import ConstantRecipe

RECIPE = ConstantRecipe("act.bound", 6.0, (4, 1, 1), "conv.weight")


def test_it_is_written_in_the_dtype_of_another_tensor_and_never_twice() -> None:
    store = StateDictStore({"conv.weight": torch.ones(4, 3, dtype=torch.float64)})
    RECIPE.run(store, {})
    expected = torch.full((4, 1, 1), 6.0, dtype=torch.float64)
    assert torch.equal(store.state["act.bound"], expected)
    assert store.state["act.bound"].dtype is torch.float64
    with pytest.raises(CheckpointError, match=r"act\.bound already"):
        RECIPE.run(store, {})


def test_a_report_holds_it() -> None:
    assert from_data(RECIPE.to_data()).to_data() == RECIPE.to_data()


@pytest.mark.parametrize("shape", [[], [0], [-1, 4], [1 << 21], [1 << 40, 1 << 40]])
def test_a_shape_that_no_channels_have_is_refused(shape: list[int]) -> None:
    with pytest.raises(CheckpointError, match="the report gives it the shape"):
        from_data({**RECIPE.to_data(), "shape": shape})
