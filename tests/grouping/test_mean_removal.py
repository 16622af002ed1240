from __future__ import annotations

import numpy as np
import pytest

from rewrite.grouping.mean_removal import RANGE, factors, removal_error


def covariance(groups: int, size: int, rank: int | None = None, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    root = random.standard_normal((groups, size, rank or size))
    return np.asarray(np.einsum("gik,gjk->gij", root, root))


def error_by_simulation(second: np.ndarray, gamma: np.ndarray, factor: np.ndarray) -> float:
    """E error² of one group, from samples of the channel means."""
    random = np.random.default_rng(0)
    size = len(gamma)
    means = random.multivariate_normal(np.zeros(size), second, 200_000)
    taken = (means @ factor) / size
    return float(((gamma / factor * taken[:, None]) ** 2).sum(1).mean())


def test_the_formula_is_the_error() -> None:
    second, gamma = covariance(1, 4), np.array([[1.0, -2.0, 0.5, 3.0]])
    factor = np.array([[1.0, -0.5, 2.0, 1.5]])
    simulated = error_by_simulation(second[0], gamma[0], factor[0])
    assert removal_error(second, gamma, factor)[0] / 16 == pytest.approx(simulated, rel=0.02)
    assert removal_error(second, gamma, np.ones_like(factor))[0] / 16 != pytest.approx(
        simulated, rel=0.1
    )


@pytest.mark.parametrize("size", [2, 5, 16])
def test_factors_lower_the_error(size: int) -> None:
    second, gamma = covariance(3, size), np.random.default_rng(1).uniform(0.2, 2, (3, size))
    plain = removal_error(second, gamma, np.ones_like(gamma))
    signs = removal_error(second, gamma, factors(second, gamma, sizes=1.0))
    both = removal_error(second, gamma, factors(second, gamma))
    assert (signs <= plain * 1.0001).all() and both.sum() < signs.sum() < plain.sum()


def test_directions_that_never_vary_are_found() -> None:
    second, gamma = covariance(1, 16, rank=4), np.ones((1, 16))
    found = factors(second, gamma, shrinkage=0.0)
    assert (
        removal_error(second, gamma, found)[0]
        < 0.02 * removal_error(second, gamma, np.ones_like(found))[0]
    )


def test_factors_stay_in_range_and_keep_their_sign() -> None:
    second, gamma = covariance(2, 8), np.full((2, 8), 1.0)
    found = factors(second, gamma, signed=False)
    assert (found > 0).all() and (found <= RANGE).all() and (found >= 1 / RANGE).all()
    assert set(np.abs(factors(second, gamma, sizes=1.0)).ravel()) == {1.0}


def test_degenerate_groups_stay_finite() -> None:
    for second, gamma in (
        (np.zeros((1, 4, 4)), np.ones((1, 4))),
        (covariance(1, 4), np.zeros((1, 4))),
        (covariance(1, 1), np.ones((1, 1))),
    ):
        found = factors(second, gamma)
        assert np.isfinite(found).all() and (found != 0).all()


def test_the_same_numbers_give_the_same_factors() -> None:
    second, gamma = covariance(2, 8), np.ones((2, 8))
    assert np.array_equal(factors(second, gamma), factors(second, gamma))
