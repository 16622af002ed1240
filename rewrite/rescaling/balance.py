"""Scales that balance the weights into each unit against those out of it.

    P_u = Σ or max over edges into u of M r_u / r_i,     Q_u = the same over edges out of u

    "l2"         min Σ all edges              P_u = Q_u       r = d²,   m = w²     (ENorm)
    "equalize"   the largest of both alike    P_u = Q_u       r = d,    m = |w|    (max for Σ)
    "path"       min n log S - Σ_u k_u log r_u,  S = Σ all edges,  n = how many edges there are,
                 k_u = edges into u - out of u;  n (P_u - Q_u) / S = k_u   r = 1/d²,  m = κ(w)

The first and the third are convex in log r, so block coordinate descent, one group of channels at a
time, converges to the only minimum, where the equation holds. One step solves it for all units of
a group, with a = n P / S and b = n Q / S: r ← r (k + √(k² + 4ab)) / 2a, which is √(Q/P) for k = 0.
For "path" this minimizes an upper bound (log S ≤ log S₀ + S / S₀ - 1), so the objective decreases,
too. Where units of a group are coupled, half a step decreases it: e^((x-y)/2) ≤ (e^x + e^-y) / 2.

Stock et al. 2019, https://arxiv.org/abs/1902.10416 (ENorm); Nagel et al. 2019,
https://arxiv.org/abs/1906.04721 (equalization); Lebeurrier et al. 2026,
https://arxiv.org/abs/2602.19799 (path-conditioned training).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.rescaling.couplings import Coupling

LARGEST_LOG_SCALE = 19 * math.log(2)
"""Of d: a map beyond 2^20 is not inverted, as it loses precision (`rewrite.fold.requirements`)."""


_COARSE_SWEEPS, _COARSE_TOLERANCE = 30, 1e-12


@dataclass(frozen=True)
class Balanced:
    """Scales, and how well they balance a network.

    Attributes:
        log_scales: log d of every unit, float64; 0 for a unit without nonzero edges into it or out
            of it, and for one that keeps its scale.
        before, after: the largest |log d| of a single step, at the beginning and at the end.
        sweeps: the number of sweeps over all groups.
        loss: the objective before and after; None for "equalize".
    """

    log_scales: Tensor
    before: float
    after: float
    sweeps: int
    loss: tuple[float, float] | None


@dataclass(frozen=True)
class _Sides:
    """Sums of edges around one group, layer by layer: into its units, and out of them."""

    written: Mapping[int, Tensor]
    read: Mapping[int, Tensor]


class Balance:
    """Block coordinate descent over the groups of units of one network.

    Args:
        edges: the edges of each layer; units are numbered, -1 has scale 1.
        groups: the units whose scales may change, group by group.
        left: units of them that keep their scale.
        largest: use max instead of Σ.
        counted: whether units have a k ("path").
    """

    def __init__(
        self,
        edges: Sequence[Coupling],
        groups: Sequence[Tensor],
        left: Collection[int] = (),
        *,
        largest: bool = False,
        counted: bool = False,
    ) -> None:
        self._largest = largest
        self._counted = counted
        self._edges = list(edges)
        self._given = torch.cat([*groups, torch.zeros(0, dtype=torch.int64)])
        alive = _alive(self._edges) - set(left)
        kept = [group[[unit in alive for unit in group.tolist()]] for group in groups]
        self._units = torch.cat([*kept, torch.zeros(0, dtype=torch.int64)])
        self._size = len(self._units)
        self._place = {unit: number for number, unit in enumerate(self._units.tolist())}
        starts = torch.tensor([0, *(len(group) for group in kept)]).cumsum(0).tolist()
        self._slices = [slice(a, b) for a, b in itertools.pairwise(starts) if a < b]
        self._writes = [self._numbers(edge.writes) for edge in edges]
        self._reads = [self._numbers(edge.reads) for edge in edges]
        sides = [_touching(numbers, self._slices) for numbers in (self._writes, self._reads)]
        self._around = list(zip(*sides, strict=True))
        self.log_r = torch.zeros(self._size + 1, dtype=torch.float64)  # the last one stays 0
        self.count = sum(float(e.counts.sum() * e.matrix.shape[1]) for e in edges)
        self.k = torch.zeros(self._size, dtype=torch.float64)
        if counted:
            self.k = _balance_of_counts(self._edges, self._writes, self._reads, self._size)
        self._totals = [float(self._rows(i).sum()) + e.constant for i, e in enumerate(edges)]

    def run(self, tolerance: float = 1e-10, sweeps: int = 1000) -> Balanced:
        """Descend until no step changes a scale by more than `tolerance`, relative."""
        before, first = self._imbalance(), self.loss()
        moved, done = math.inf, 0
        while moved > tolerance and done < sweeps:
            moved = max((self._step(number) for number in range(len(self._slices))), default=0.0)
            if not self._largest and len(self._slices) > 1:
                self._shift_groups()
            done += 1
        half = 1.0 if self._largest else 0.5
        loss = None if self._largest else (first, self.loss())
        place = [self._place.get(unit, self._size) for unit in self._given.tolist()]
        scales = (-half if self._counted else half) * self.log_r[place]
        return Balanced(scales, half * before, half * self._imbalance(), done, loss)

    def loss(self) -> float:
        """Return the objective; for "equalize", which minimizes none, the sum over all outputs."""
        total = sum(self._totals)
        if not self._counted:
            return total
        return self.count * math.log(total) - float((self.k * self.log_r[:-1]).sum())

    # -- steps --------------------------------------------------------------------------------

    def _step(self, number: int) -> float:
        """Balance one group, and return the largest change of a log d."""
        part = self._slices[number]
        sides = self._sides(number)
        change = self._wanted(number, sides)
        if sides.written.keys() & sides.read.keys():
            change = change / 2
        bound = LARGEST_LOG_SCALE * (1 if self._largest else 2)
        old = self.log_r[part].clone()
        self.log_r[part] = (old + change).clamp(-bound, bound)
        if self._counted:
            self._follow(sides, part, self.log_r[part] - old)
        return float((self.log_r[part] - old).abs().max()) * (1.0 if self._largest else 0.5)

    def _wanted(self, number: int, sides: _Sides) -> Tensor:
        """Return the change of log r that solves the equation of every unit of a group."""
        p, q = self._sums(number, sides)
        if not self._counted:
            return (q / p).log() / 2
        scale = self.count / sum(self._totals)
        return solve(scale * p, scale * q, self.k[self._slices[number]]).log()

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, group by group, the units with edges on both sides, their P and their Q."""
        for number, part in enumerate(self._slices):
            yield (self._units[part], *self._sums(number, self._sides(number)))

    def _sides(self, number: int) -> _Sides:
        """Return the sums of edges of the layers around a group."""
        writers, readers = self._around[number]
        return _Sides({i: self._rows(i) for i in writers}, {i: self._columns(i) for i in readers})

    def _sums(self, number: int, sides: _Sides) -> tuple[Tensor, Tensor]:
        """Return P and Q of the units of a group."""
        part = self._slices[number]
        written = self._collect(sides.written, self._writes)[part]
        return written, self._collect(sides.read, self._reads)[part]

    def _follow(self, sides: _Sides, part: slice, change: Tensor) -> None:
        """Update the sums of the layers around a group after a change of its scales."""
        ratio = torch.ones(self._size + 1, dtype=torch.float64)
        ratio[part] = change.exp()
        both = sides.written.keys() & sides.read.keys()
        for i in sides.written.keys() - both:
            total = (sides.written[i] * ratio[self._writes[i]]).sum()
            self._totals[i] = float(total) + self._edges[i].constant
        for i in sides.read.keys() - both:
            total = (sides.read[i] / ratio[self._reads[i]]).sum()
            self._totals[i] = float(total) + self._edges[i].constant
        self._add_up(both)

    def _imbalance(self) -> float:
        groups = range(len(self._slices))
        wanted = [self._wanted(number, self._sides(number)) for number in groups]
        return max((float(w.abs().max()) for w in wanted if w.numel()), default=0.0)

    def _shift_groups(self) -> None:
        """Balance whole groups against each other, which steps of single groups do only slowly."""
        place = torch.full((self._size + 1,), len(self._slices))
        for number, part in enumerate(self._slices):
            place[part] = number
        between = self._between_groups(place)
        k = torch.stack([self.k[part].sum() for part in self._slices])
        loops = sum(edge.constant for edge in self._edges)
        shift = shift_of_groups(between, k, self.count if self._counted else None, loops)
        moved = self.log_r[:-1] + shift[place[:-1]]
        if not bool((moved.abs() <= 2 * LARGEST_LOG_SCALE).all()):
            return
        self.log_r[:-1] = moved
        self._add_up(range(len(self._edges)))

    def _between_groups(self, place: Tensor) -> Tensor:
        """Return the sums of all edges between groups; the last row and column are of scale 1."""
        size = len(self._slices) + 1
        between = torch.zeros(size, size, dtype=torch.float64)
        for i, edge in enumerate(self._edges):
            owners, scale = place[self._writes[i]], self._r(self._writes[i])
            for owner in set(owners.flatten().tolist()):
                own = torch.where(owners == owner, scale, 0.0)
                given = torch.matmul(own[:, None, :], edge.matrix).squeeze(1)
                given = given / self._r(self._reads[i])
                between[owner].index_add_(0, place[self._reads[i]].flatten(), given.flatten())
        return between

    # -- sums ---------------------------------------------------------------------------------

    def _r(self, numbers: Tensor) -> Tensor:
        return self.log_r[numbers].exp()

    def _rows(self, i: int) -> Tensor:
        """Return the sum of edges into each output of a layer, (groups, out)."""
        inverse = (-self.log_r[self._reads[i]]).exp()
        matrix = self._edges[i].matrix
        gathered = (
            (matrix * inverse[:, None, :]).amax(2)
            if self._largest
            else torch.matmul(matrix, inverse[:, :, None]).squeeze(2)
        )
        return gathered * self._r(self._writes[i])

    def _columns(self, i: int) -> Tensor:
        """Return the sum of edges out of each input of a layer, (groups, in)."""
        scale = self._r(self._writes[i])
        matrix = self._edges[i].matrix
        gathered = (
            (matrix * scale[:, :, None]).amax(1)
            if self._largest
            else torch.matmul(scale[:, None, :], matrix).squeeze(1)
        )
        return gathered / self._r(self._reads[i])

    def _collect(self, gathered: Mapping[int, Tensor], numbers: list[Tensor]) -> Tensor:
        total = torch.zeros(self._size + 1, dtype=torch.float64)
        for i, each in gathered.items():
            values = each.flatten()
            if self._largest:
                total.scatter_reduce_(0, numbers[i].flatten(), values, "amax")
            else:
                total.index_add_(0, numbers[i].flatten(), values)
        return total

    def _add_up(self, layers: Iterable[int]) -> None:
        """Recompute the sums of the given layers."""
        for i in layers:
            self._totals[i] = float(self._rows(i).sum()) + self._edges[i].constant

    # -- structure ----------------------------------------------------------------------------

    def _numbers(self, units: Tensor) -> Tensor:
        numbers = [self._place.get(unit, self._size) for unit in units.flatten().tolist()]
        return torch.tensor(numbers, dtype=torch.int64).view(units.shape)


def _balance_of_counts(
    edges: Sequence[Coupling], writes: Sequence[Tensor], reads: Sequence[Tensor], size: int
) -> Tensor:
    """Return k of every unit: the number of edges into it minus the number out of it."""
    balance = torch.zeros(size + 1, dtype=torch.float64)
    for edge, written, read in zip(edges, writes, reads, strict=True):
        counts = edge.counts.double()
        into = counts.sum(2).expand(-1, edge.matrix.shape[1])
        out = counts.squeeze(1) * edge.matrix.shape[1]
        balance.index_add_(0, written.flatten(), into.flatten())
        balance.index_add_(0, read.flatten(), -out.flatten())
    return balance[:-1]


def _alive(edges: Sequence[Coupling]) -> set[int]:
    """Return the units with nonzero edges into them and out of them."""
    written = {u for e in edges for u in e.writes[e.matrix.amax(2) > 0].tolist()}
    read = {u for e in edges for u in e.reads[e.matrix.amax(1) > 0].tolist()}
    return written & read


def _touching(numbers: Sequence[Tensor], parts: Sequence[slice]) -> list[list[int]]:
    """Return, for each part, the layers with a unit in it."""
    found: list[list[int]] = [[] for _ in parts]
    stops = torch.tensor([part.stop for part in parts])
    for layer, own in enumerate(numbers):
        for part in sorted(set(torch.bucketize(own, stops, right=True).flatten().tolist())):
            if part < len(parts):  # a unit behind the last part has scale 1
                found[part].append(layer)
    return found


def solve(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """Return the r > 0 with a r - b / r = k, without cancellation; a, b > 0."""
    root = (k * k + 4 * a * b).sqrt()
    return torch.where(k > 0, (k + root) / (2 * a), 2 * b / (root - k))


def shift_of_groups(between: Tensor, k: Tensor, count: float | None, loops: float) -> Tensor:
    """Return log r of each group that balances whole groups: the same descent on their sums.

    Args:
        between: the sums of edges from group to group, (groups + 1, groups + 1); row and column
            of the last are of scale 1.
        k: the sum of k over each group.
        count: n of "path"; None for "l2".
        loops: the sum of the edges within groups, which are not in `between`.
    """
    # Numbers of Python: a step is a few dozen of them, and a tensor operation costs as much as all.
    loops += float(between.diagonal().sum())
    edges = between.clone().fill_diagonal_(0.0)
    rows, columns, kinds = edges.tolist(), edges.T.tolist(), k.tolist()
    r = [1.0] * len(rows)
    for _ in range(_COARSE_SWEEPS):
        moved = 0.0
        inverse = [1 / one for one in r]
        total = loops + sum(one * _sumprod(row, inverse) for one, row in zip(r, rows, strict=True))
        for group, wanted in enumerate(kinds):
            p = _sumprod(rows[group], inverse) * r[group]
            q = _sumprod(columns[group], r) * inverse[group]
            if not p > 0 or not q > 0:
                continue
            scale = 1.0 if count is None else count / total
            factor = _solve_one(scale * p, scale * q, wanted)
            total += p * (factor - 1) + q * (1 / factor - 1)
            r[group] *= factor
            inverse[group] = 1 / r[group]
            moved = max(moved, abs(math.log(factor)))
        if moved < _COARSE_TOLERANCE:
            break
    return torch.tensor(r[:-1], dtype=torch.float64).log()


def _solve_one(a: float, b: float, k: float) -> float:
    """Return `solve` for three Python numbers."""
    root = math.sqrt(k * k + 4 * a * b)
    return (k + root) / (2 * a) if k > 0 else 2 * b / (root - k)


def _sumprod(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the inner product of two sequences of numbers."""
    return float(sum(map(operator.mul, one, other)))
