"""Means and second moments of a norm's input, summed over batches."""

from __future__ import annotations

import torch

from rewrite.grouping.statistics import MeanStatistics


def test_sums_over_all_channels_hold_those_of_any_groups() -> None:
    samples = torch.randn(7, 12, dtype=torch.float64)
    order = torch.randperm(12)
    wide, narrow = MeanStatistics.zeros(12, 1), MeanStatistics.zeros(12, 3)
    wide.add(samples)
    narrow.add(samples[:, order])
    grouped = wide.grouped(order, 3)
    assert torch.equal(grouped.total, narrow.total)
    torch.testing.assert_close(grouped.second, narrow.second, rtol=1e-14, atol=1e-14)


def test_sums_are_those_of_numpy_and_add_up() -> None:
    means = torch.randn(20, 6, dtype=torch.float64)
    whole, parts = MeanStatistics.zeros(6, 2), MeanStatistics.zeros(6, 2)
    whole.add(means)
    for part in means.split(7):
        parts.add(part)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.covariance[1], torch.cov(means[:, 3:].T, correction=0))
    torch.testing.assert_close(whole.mean.flatten(), means.mean(0))
    assert not torch.allclose(whole.covariance[0], whole.covariance[1])


def test_samples_that_are_not_finite_do_not_count() -> None:
    sums = MeanStatistics.zeros(2, 1)
    sums.add(torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, float("inf")]]))
    assert int(sums.count) == 1 and torch.isfinite(sums.covariance).all()
