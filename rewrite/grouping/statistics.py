"""Means and second moments of a norm's input by channel, summed over batches in float64.

For each norm, over the samples s with channel means z̄_s (means over space; for a norm that works
position by position, each position is a sample):

    count = Σ 1      total = Σ z̄_s      second = Σ z̄_s z̄_sᵀ within each group

All three are sums, so batches stream, and under `torch.distributed` the ranks' sums are added:
every rank ends with the numbers of the whole data, up to float64 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.distributed import all_reduce


@dataclass
class MeanStatistics:
    """Sums over samples of one norm's channel means, by group."""

    groups: int
    count: Tensor
    total: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, channels: int, groups: int) -> MeanStatistics:
        """Return the sums over no sample."""
        size = channels // groups
        return cls(
            groups,
            torch.zeros((), dtype=torch.float64),
            torch.zeros(groups, size, dtype=torch.float64),
            torch.zeros(groups, size, size, dtype=torch.float64),
        )

    def add(self, means: Tensor) -> None:
        """Add samples: `means` is (samples, channels)."""
        samples = means.detach().double().cpu().reshape(len(means), self.groups, -1)
        samples = samples[torch.isfinite(samples).all(2).all(1)]
        self.count += len(samples)
        self.total += samples.sum(0)
        self.second += torch.einsum("sgi,sgj->gij", samples, samples)

    def grouped(self, order: Tensor, groups: int) -> MeanStatistics:
        """Return the same sums with the channels in another order, in groups of consecutive ones.

        Only sums within a group of channels are there to be taken: all of them where that is one.
        """
        total = self.total.flatten()[order].reshape(groups, -1)
        if self.groups == groups == len(order):
            return MeanStatistics(groups, self.count, total, self.second[order])
        assert self.groups == 1
        rows = order.reshape(groups, -1)
        second = self.second[0][rows[:, :, None], rows[:, None, :]]
        return MeanStatistics(groups, self.count, total, second)

    def mapped(self, matrix: Tensor) -> MeanStatistics:
        """Return the sums over the samples, each multiplied by `matrix`, channel by channel."""
        total = (matrix @ self.total.flatten())[:, None]
        second = torch.full((len(total), 1, 1), float("nan"), dtype=torch.float64)
        return MeanStatistics(len(total), self.count, total, second)

    def reduce(self) -> None:
        """Add the sums of all ranks, if this process is one of several."""
        for tensor in (self.count, self.total, self.second):
            all_reduce(tensor)

    @property
    def mean(self) -> Tensor:
        """The mean over samples, (groups, size)."""
        return self.total / self.count.clamp(min=1)

    @property
    def covariance(self) -> Tensor:
        """The covariance over samples within each group, (groups, size, size)."""
        mean = self.mean
        second = self.second / self.count.clamp(min=1)
        return second - mean[:, :, None] * mean[:, None, :]
