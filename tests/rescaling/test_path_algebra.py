"""The two ways of adding up paths give the sum over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.rescaling.paths import WITHOUT_WEIGHTS, agree, random_chain

"""Of each unit, the products of all paths that end in it."""


@pytest.mark.parametrize("name", sorted(WITHOUT_WEIGHTS))
@settings(max_examples=4)
@given(seed=st.integers(0, 99))
def test_equals_the_sum_over_all_paths_through(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    steps = [nn.Conv2d(2, 2, 2, padding=1), nn.ReLU(), WITHOUT_WEIGHTS[name]()]
    if name != "flatten":
        steps += ["mark", nn.Conv2d(2, 2, 1), "skip", "cat", "double", "mean", nn.Linear(4, 2)]
    agree(random_chain(steps, seed), (2, 3, 3))
