"""Channels assigned to the groups of a norm such that subtracting the group means costs least."""

from __future__ import annotations

import numpy as np
import pytest

from rewrite.grouping.assignment import Means, Sums, regrouped
from rewrite.grouping.mean_removal import factors, removal_error


def means(channels: int, seed: int = 0, **options: bool) -> Means:
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((channels, channels // 3 + 1))
    covariance = mixing @ mixing.T / channels + 0.01 * np.eye(channels)
    return Means(covariance, random.uniform(0.5, 2.0, channels), **options)


def lost(item: Means, order: np.ndarray, groups: int) -> float:
    rows = order.reshape(groups, -1)
    second = item.covariance[rows[:, :, None], rows[:, None, :]]
    weight = item.weight[rows]
    return float(removal_error(second, weight, factors(second, weight, shrinkage=0.0)).sum())


@pytest.mark.parametrize(("channels", "groups"), [(24, 3), (32, 16), (60, 10)])
def test_other_groups_lose_less(channels: int, groups: int) -> None:
    item = means(channels)
    order = regrouped([item], groups)
    assert sorted(order) == list(range(channels))
    assert lost(item, order, groups) < 0.8 * lost(item, np.arange(channels), groups)


def test_channels_that_cancel_come_together() -> None:
    covariance = np.eye(8) + 0.999 * np.eye(8)[::-1]
    order = regrouped([Means(covariance, np.ones(8))], 4)
    assert {frozenset(pair) for pair in order.reshape(4, 2).tolist()} == {
        frozenset((c, 7 - c)) for c in range(4)
    }


def test_norms_that_share_an_order_each_count() -> None:
    items = [means(48, seed) for seed in (1, 2)]
    order, own = regrouped(items, 6), regrouped(items[:1], 6)
    identity = np.arange(48)
    assert all(lost(item, order, 6) < lost(item, identity, 6) for item in items)
    assert lost(items[1], order, 6) < lost(items[1], own, 6)


def test_without_signs_or_factors_the_search_still_ends() -> None:
    for options in ({"signed": False}, {"sized": False, "signed": False}):
        order = regrouped([means(24, **options)], 4)
        assert sorted(order) == list(range(24))


def test_rounding_decides_nothing() -> None:
    item = means(48)
    alive = np.repeat([1.0, 0.0], [40, 8])
    covariance, weight = item.covariance * alive * alive[:, None], item.weight * alive
    noise = 1 + 1e-14 * np.random.default_rng(0).standard_normal((48, 48))
    expected = regrouped([Means(covariance, weight)], 6)
    for other in (noise, noise**2, noise**3):
        assert np.array_equal(regrouped([Means(covariance * other, weight)], 6), expected)


@pytest.mark.parametrize("covariance", [np.zeros((8, 8)), np.diag([0.0] * 7 + [1e30])])
def test_degenerate_means_give_an_order(covariance: np.ndarray) -> None:
    assert sorted(regrouped([Means(covariance, np.zeros(8))], 2)) == list(range(8))


@pytest.mark.parametrize("signed", [True, False])
def test_the_sums_that_are_kept_are_those_summed_anew(signed: bool) -> None:
    random = np.random.default_rng(0)
    part = Sums.of(means(20, signed=signed), random)
    label = np.arange(20) // 5
    part.fresh(label, 4)
    for c in (0, 7, 19, 3):
        exchange = part.exchange(c, label)
        d = int(np.where(label == label[c], 0, exchange.change).argmin())
        if label[d] == label[c]:
            continue
        before = part.loss
        part.apply(c, d, label, exchange)
        label[c], label[d] = label[d], label[c]
        assert part.loss == pytest.approx(before + exchange.change[d])
        member = np.zeros((20, 4))
        member[np.arange(20), label] = part.sign
        np.testing.assert_allclose(part.product, part.kernel @ member, atol=1e-12)
        np.testing.assert_allclose(part.square, (member * part.product).sum(0), atol=1e-12)
