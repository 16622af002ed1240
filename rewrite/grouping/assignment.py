"""Assign channels to the groups of a norm such that subtracting the group means costs least.

A group norm subtracts from each channel the mean of its group. With w = γ², S the covariance of the
channel means over samples, and a factor a on each channel, a group of n channels errs by
(Σ w/a²)(aᵀ S a)/n² (`rewrite.grouping.mean_removal`). With the factors that would be best for
uncorrelated means, |a|⁴ = w/S_cc, that is, but for a constant,

    loss = Σ_g U_g Q_g,   U_g = Σ w/a²,   Q_g = |Σ b f|²,   b = ±1,   f_i·f_j = |a_i||a_j| S_ij

with sums over the channels of group g: each group should hold vectors f whose signed sum is short.
Norms that share one order of channels share the groups; each has its own signs, and its loss counts
in units of Σ w. This is a local search: each channel in turn changes places with the best channel
of another group, and signs flip, as long as the loss falls. Trying all partners of a channel costs
O(C), since the Gram matrix K = f·f and its sums over groups are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


Labels = NDArray[np.int64]


_SWEEPS = 30


_LEAST_GAIN = 1e-3


_DIGITS = 9
"""Digits of the covariance that count: what ranks sum up in another order decides nothing."""


_TIE = 12
"""Digits of a change of the loss that count: among equals, channels without any variance for one,
the first is taken."""


@dataclass(frozen=True)
class Means:
    """The channel means of one norm: how they vary together, and how much each counts.

    Attributes:
        covariance: of the channel means, over all channels, shrunk as it will be for the factors.
        weight: γ.
        signed: whether factors may be negative.
        sized: whether there are factors at all; else only the groups matter.
    """

    covariance: Array
    weight: Array
    signed: bool = True
    sized: bool = True


@dataclass(eq=False)
class Sums:
    """One norm's sums over each group, kept up to date.

    Attributes:
        kernel: K = f·f, in units of the norm's Σ w.
        share: w/a² of each channel.
        sign: b.
        product: f_c · Σ_g b f, (channels, groups).
        square, total: Q and U of each group.
    """

    kernel: Array
    share: Array
    sign: Array
    signed: bool
    product: Array = field(default_factory=lambda: np.zeros(0))
    square: Array = field(default_factory=lambda: np.zeros(0))
    total: Array = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, means: Means, random: np.random.Generator) -> Sums:
        """Return the scaled kernel of the loss, with random signs where means may have any."""
        covariance = means.covariance
        variance = np.maximum(np.diag(covariance), 1e-30)
        scale = max(float(variance.mean()), 1e-30)
        covariance = np.round(covariance / scale, _DIGITS)
        variance = np.maximum(np.diag(covariance), 1e-4)
        weight = means.weight**2
        weight = weight / max(float(weight.mean()), 1e-30) + 1e-4
        size = (weight / variance) ** 0.25 if means.sized else np.ones_like(weight)
        sign = random.choice([-1.0, 1.0], len(weight))
        return cls(
            covariance * size[:, None] * size / weight.sum(), weight / size**2,
            sign if means.signed else np.ones_like(sign), means.signed,
        )  # fmt: skip

    @property
    def loss(self) -> float:
        """What the groups lose."""
        return float((self.total * self.square).sum())

    def fresh(self, label: Labels, groups: int) -> None:
        """Sum up anew, and turn each sign that lowers the loss."""
        channels = np.arange(len(label))
        member = np.zeros((len(label), groups))
        member[channels, label] = self.sign
        self.product = self.kernel @ member
        self.square = (member * self.product).sum(0)
        self.total = np.abs(member).T @ self.share
        for c in channels if self.signed else channels[:0]:
            group = label[c]
            change = 4 * (self.kernel[c, c] - self.sign[c] * self.product[c, group])
            if change < -1e-12:
                self.product[:, group] -= 2 * self.sign[c] * self.kernel[:, c]
                self.square[group] += change
                self.sign[c] *= -1

    def exchange(self, c: int, label: Labels) -> _Exchange:
        """Return what it would do to exchange channel c with each other channel."""
        kernel, sign, own = self.kernel, self.sign, label[c]
        diagonal = np.einsum("ii->i", kernel)
        left = self.square[own] - 2 * sign[c] * self.product[c, own] + kernel[c, c]
        toward = self.product[:, own] - sign[c] * kernel[:, c]
        theirs = self.product[np.arange(len(label)), label]
        remain = self.square[label] - 2 * sign * theirs + diagonal
        meets = self.product[c, label] - sign * kernel[c]
        into = np.where(toward > 0, -1.0, 1.0) if self.signed else np.ones_like(sign)
        out = np.where(meets > 0, -1.0, 1.0) if self.signed else np.ones_like(sign)
        square = (left + diagonal + 2 * into * toward, remain + kernel[c, c] + 2 * out * meets)
        total = (
            self.total[own] - self.share[c] + self.share,
            self.total[label] - self.share + self.share[c],
        )
        before = self.total * self.square
        change = square[0] * total[0] + square[1] * total[1] - before[own] - before[label]
        return _Exchange(change, square, total, into, out)

    def apply(self, c: int, d: int, label: Labels, exchange: _Exchange) -> None:
        """Let channels `c` and `d` change groups."""
        own, other = label[c], label[d]
        into, out = exchange.into[d], exchange.out[d]
        kernel, sign = self.kernel, self.sign
        self.product[:, own] += into * kernel[:, d] - sign[c] * kernel[:, c]
        self.product[:, other] += out * kernel[:, c] - sign[d] * kernel[:, d]
        for group, part in ((own, 0), (other, 1)):
            self.square[group] = exchange.square[part][d]
            self.total[group] = exchange.total[part][d]
        sign[d], sign[c] = into, out


@dataclass(frozen=True)
class _Exchange:
    """For each partner: the change of the loss, Q and U of both groups, and the new signs."""

    change: Array
    square: tuple[Array, Array]
    total: tuple[Array, Array]
    into: Array
    out: Array


def regrouped(norms: Sequence[Means], groups: int, seed: int = 0) -> Labels:
    """Return the channels in an order in which consecutive ones form good groups.

    Args:
        norms: all norms that share the order.
        groups: how many groups of equal size each of them has.
        seed: of the starting signs and of the order in which channels are tried.
    """
    channels = len(norms[0].weight)
    random = np.random.default_rng(seed)
    label = np.arange(channels) // (channels // groups)
    parts = [Sums.of(means, random) for means in norms]
    before = np.inf
    for _ in range(_SWEEPS):
        for part in parts:
            part.fresh(label, groups)
        loss = sum(part.loss for part in parts)
        if loss > (1 - _LEAST_GAIN) * before:
            break
        before = loss
        for c in random.permutation(channels):
            _exchange_best(int(c), parts, label)
    order: Labels = np.argsort(label, kind="stable")
    return order


def _exchange_best(c: int, parts: Sequence[Sums], label: Labels) -> None:
    exchanges = [part.exchange(c, label) for part in parts]
    change = np.round(np.sum([exchange.change for exchange in exchanges], axis=0), _TIE)
    change[label == label[c]] = 0
    d = int(change.argmin())
    if change[d] >= 0:
        return
    for part, exchange in zip(parts, exchanges, strict=True):
        part.apply(c, d, label, exchange)
    label[c], label[d] = label[d], label[c]
