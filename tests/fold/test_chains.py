"""Folding random chains of operations: what is folded is the same function, whatever it is."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from passes import FoldNorm
from rewrite.protocol import apply_pass
from tests.fold.chains import OPERATIONS, Chain, around_norm, chains

RIGHT = 1e-7


def differs(chain: Chain, folded: torch.nn.Module) -> float:
    """Return the largest relative difference on other values, sizes of values and batches."""
    worst = 0.0
    torch.manual_seed(1)
    for batch, size in ((2, 1.0), (2, 100.0), (3, 1.0)):
        x = size * torch.randn(batch, 3, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            want, got = chain(x.clone()), folded(x.clone())
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        worst = max(worst, relative(got, want))
    return worst


def relative(got: Tensor, want: Tensor) -> float:
    finite = want.isfinite()
    if not bool((finite == got.isfinite()).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    size = want[finite].abs().max().clamp_min(1e-12)
    return float((got[finite] - want[finite]).abs().max() / size)


def hold(chain: Chain, shapes: bool, absorb_inverse: bool) -> None:
    inputs = (torch.randn(2, 3, 6, 6, dtype=torch.float64),) if shapes else None
    applied = apply_pass(FoldNorm(compensate=absorb_inverse), copy.deepcopy(chain), inputs)
    folded = [(change.target, change.after) for change in applied.changes]
    assert differs(chain, applied.model) < RIGHT, (chain.names, folded)


@settings(max_examples=300)
@given(chains(), st.booleans(), st.booleans())
def test_a_folded_chain_is_the_same_function(
    chain: Chain, shapes: bool, absorb_inverse: bool
) -> None:
    hold(chain, shapes, absorb_inverse)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_beside_a_norm(name: str) -> None:
    for before in (True, False):
        hold(around_norm(name, before), shapes=True, absorb_inverse=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_ten_thousand_folded_chains_are_the_same_function(number: int) -> None:
    @seed(number)
    @settings(max_examples=2500, derandomize=False)
    @given(chains(), st.booleans(), st.booleans())
    def folded(chain: Chain, shapes: bool, absorb_inverse: bool) -> None:
        hold(chain, shapes, absorb_inverse)

    folded()
