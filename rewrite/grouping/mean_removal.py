"""The group mean that an anchored norm subtracts, and the channel factors that keep it small.

An anchored norm of n channels returns γ (z − m) + β: the mean m of the group over channels and
space, which differs from sample to sample, is taken from every channel. Multiply channel c by a_c
in its producer and divide γ_c by a_c. The function of the old norm does not change, and with z̄ the
channel means of one sample the new one computes

    y_c = γ_c (z_c − (a·z̄) / (n a_c)) + β_c

    E error² = (1/n²) (Σ_c w_c / a_c²) (aᵀ S a),   S the covariance of z̄, w_c = γ_c²

Signs alone let the means cancel; sizes follow the directions in which channel means never vary, and
spare channels with a large γ. E[a·z̄] goes into β. The product has one factor that falls and one
that rises with each |a_c|: coordinate descent, each coordinate over a grid of sizes and both signs,
never increases it, and no step takes a derivative. S comes from few samples, so part of it is
replaced by its diagonal.

A group of one channel has n = 1: y_c = γ_c (z_c − z̄_c), whatever a is. Its mean is lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


SHRINKAGE = 0.3
"""Part of the covariance that is replaced by its diagonal."""


RANGE = 16.0
"""Largest |a_c|, and the reciprocal of the smallest."""


_SWEEPS = 5


_RESTARTS = 3


_GRID = 17


_FINE = np.array([1.0, 1.1, 1 / 1.1, 1.03, 1 / 1.03])


def factors(
    second: Array,
    weight: Array,
    *,
    signed: bool = True,
    sizes: float = RANGE,
    shrinkage: float = SHRINKAGE,
    seed: int = 0,
) -> Array:
    """Return the factors a, one row a group.

    Args:
        second: the covariance of the channel means within each group, (groups, n, n).
        weight: γ, (groups, n).
        signed: whether negative factors are allowed.
        sizes: the largest size, and the reciprocal of the smallest; 1 for signs alone.
        shrinkage: part of the covariance that is replaced by its diagonal.
        seed: of the starting signs and the order of the coordinates.
    """
    groups, size = weight.shape
    if size == 1:
        return np.ones_like(weight)
    random = np.random.default_rng(seed)
    restarts = _RESTARTS if size <= 128 else 1
    covariance = np.tile(_shrunk(second, shrinkage), (restarts, 1, 1))
    importance = np.tile(_importance(weight), (restarts, 1))
    start = _start(covariance, importance, sizes)
    if signed:
        start = start * random.choice([-1.0, 1.0], start.shape)
    found, error = _descend(covariance, importance, start, _grid(sizes, signed), random)
    best = error.reshape(restarts, groups).argmin(0)
    chosen: Array = found.reshape(restarts, groups, size)[best, np.arange(groups)]
    return chosen


def removal_error(second: Array, weight: Array, factor: Array) -> Array:
    """Return E error² of each group by the formula above, times n²."""
    quadratic = np.einsum("gi,gij,gj->g", factor, second, factor)
    return np.asarray(quadratic * (weight**2 / factor**2).sum(1))


def _shrunk(second: Array, shrinkage: float) -> Array:
    diagonal = np.einsum("gii->gi", second)
    scale = np.maximum(diagonal.mean(1), 1e-30)[:, None, None]
    eye = np.eye(second.shape[1])
    shrunk = (1 - shrinkage) * second + shrinkage * diagonal[:, :, None] * eye
    return np.asarray(shrunk / scale + 1e-4 * eye)


def _importance(weight: Array) -> Array:
    """Return w: squared γ, no channel without any."""
    square = weight**2
    return np.asarray(square / np.maximum(square.mean(1, keepdims=True), 1e-30) + 1e-4)


def _start(covariance: Array, importance: Array, sizes: float) -> Array:
    """Return the factors that were best if no channel means were correlated."""
    size = (importance / np.einsum("gii->gi", covariance)) ** 0.25
    size = size / np.exp(np.log(size).mean(1, keepdims=True))
    return np.asarray(np.clip(size, 1 / sizes, sizes))


def _grid(sizes: float, signed: bool) -> Array:
    grid = np.geomspace(1 / sizes, sizes, _GRID) if sizes > 1 else np.ones(1)
    return np.concatenate([grid, -grid]) if signed else grid


def _descend(
    covariance: Array, importance: Array, factor: Array, grid: Array, random: np.random.Generator
) -> tuple[Array, Array]:
    rows = np.arange(len(factor))
    diagonal = np.einsum("gii->gi", covariance).copy()
    product = np.einsum("gij,gj->gi", covariance, factor)
    quadratic = (factor * product).sum(1)
    inverse = (importance / factor**2).sum(1)
    sizes = float(grid.max())
    for _ in range(_SWEEPS):
        for c in random.permutation(factor.shape[1]):
            old = factor[:, c : c + 1]
            fine = np.clip(np.abs(old) * _FINE, 1 / sizes, sizes) * np.sign(old)
            new = np.concatenate([np.broadcast_to(grid, (len(rows), len(grid))), fine], 1)
            step = new - old
            q = quadratic[:, None] + 2 * step * product[:, c : c + 1]
            q = q + step**2 * diagonal[:, c : c + 1]
            w = inverse[:, None] + importance[:, c : c + 1] * (new**-2 - old**-2)
            best = (np.maximum(q, 1e-12) * np.maximum(w, 1e-12)).argmin(1)
            quadratic, inverse = q[rows, best], w[rows, best]
            product += covariance[:, :, c] * step[rows, best][:, None]
            factor[:, c] = new[rows, best]
    return factor, np.asarray(quadratic * inverse)
