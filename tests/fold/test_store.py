"""A state dict is read by name, written beside, and never changed."""

from __future__ import annotations

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.fold.store import StateDictStore


def test_what_is_written_stands_in_a_copy() -> None:
    state = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
    store = StateDictStore(state)
    store.set("a.weight", torch.full((2,), 3.0))
    store.delete("a.bias")
    store.delete("a.bias")
    assert set(store.state) == {"a.weight"} and store.get("a.weight")[0] == 3
    assert set(state) == {"a.weight", "a.bias"} and state["a.weight"][0] == 1


def test_a_tensor_that_is_missing_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        StateDictStore({"a.weight": torch.ones(2)}).get("b.weight")


@pytest.mark.parametrize("key", ["a.parametrizations.weight.original0", "a.weight_orig"])
def test_a_tensor_that_is_computed_of_others_is_told_from_one_that_is_missing(key: str) -> None:
    missing, computed = "", ""
    for state in ({}, {key: torch.ones(2)}):
        with pytest.raises(CheckpointError) as raised:
            StateDictStore(state).get("a.weight")
        missing, computed = computed, str(raised.value)
    assert missing and computed != missing
