"""Recipes of single tensors: run by the one executor, which takes finite numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.fold.executor import run_recipes
from rewrite.fold.store import StateDictStore
from rewrite.weights.tensor_recipe import Exact, TensorRecipe, TensorStore


@dataclass(frozen=True)
class Divided(TensorRecipe):
    """a -> b = a / by."""

    by: float
    target: str = "a"

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        return {"do": "divide", "by": self.by}

    def run(self, store: TensorStore, unrounded: Exact) -> None:
        """Write the one, and take the other away."""
        old = store.get("a")
        store.set("b", old / self.by)
        store.delete("a")
        unrounded["b"] = lambda: old.double() / self.by


def test_it_writes_takes_away_and_says_what_was_not_rounded() -> None:
    store, exact = StateDictStore({"a": torch.ones(2)}), Exact()
    run_recipes([Divided(3.0)], store, exact)
    assert set(store.state) == {"b"} and exact["b"]().dtype is torch.float64
    assert torch.equal(exact["b"]().float(), store.state["b"])


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(CheckpointError, match="b would hold values that are not finite"):
        run_recipes([Divided(0.0)], StateDictStore({"a": torch.ones(2)}))
