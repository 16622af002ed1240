"""The linear maps that a stream is put through, applied to rows without ever being held whole.

    centre       C = I - 11'/d
    hadamard     Q = diag(s) H / sqrt(d),   s random signs,   H = H_2 (x) .. (x) H_2 (x) H_m
    orthogonal   Q from the QR decomposition of a Gaussian matrix

Q Q' = I. H_m is a Hadamard matrix of Paley's two constructions (q + 1 for a prime q = 3 mod 4,
2 (q + 1) for a prime q = 1 mod 4); where no such order divides d by a power of two, the odd part of
d is a random orthogonal matrix. A Kronecker product is applied factor by factor: a row of 4096
costs 64 multiplications an element, not 4096. Ashkboos et al. 2024 (QuaRot) turn streams so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError

KINDS = ("hadamard", "orthogonal")
_FACTOR = 64
"""Rows of the Hadamard factors of two that are multiplied at once."""


@dataclass(frozen=True, eq=False)
class StreamMap:
    """A map of the last axis, in float64.

    Attributes:
        size: how many channels it maps.
        signs: what each channel is multiplied by first; None for centring.
        factors: matrices whose Kronecker product follows; () for centring.
        inverse: whether the transpose is applied.
    """

    size: int
    signs: Tensor | None = None
    factors: tuple[Tensor, ...] = ()
    inverse: bool = False

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows (n, size) times the matrix."""
        if self.signs is None:
            return rows - rows.mean(-1, keepdim=True)
        signs = self.signs.to(rows.device)
        if self.inverse:
            return self._product(rows) * signs
        return self._product(rows * signs)

    def _product(self, rows: Tensor) -> Tensor:
        shape = [len(factor) for factor in self.factors]
        held = rows.reshape(len(rows), *shape)
        for place, factor in enumerate(self.factors, start=1):
            matrix = factor.to(rows.device)
            matrix = matrix.T if self.inverse else matrix
            held = torch.tensordot(held, matrix, dims=([place], [0])).movedim(-1, place)
        return held.reshape(rows.shape)

    def matrix(self) -> Tensor:
        """Return the whole matrix (size, size), in float64."""
        return self(torch.eye(self.size, dtype=torch.float64))


def stream_map(spec: Mapping[str, Any]) -> StreamMap:
    """Return the map that a recipe names: its kind, its size, its seed, and its direction.

    Raises:
        CheckpointError: the kind is unknown.
    """
    kind, size = spec.get("kind"), int(spec.get("size", 0))
    inverse = bool(spec.get("inverse", False))
    if kind == "centre":
        return StreamMap(size)
    if kind not in KINDS:
        raise CheckpointError(
            f"a stream map of kind {kind!r}; known are centre, {', '.join(KINDS)}"
        )
    generator = torch.Generator().manual_seed(int(spec.get("seed", 0)))
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    factors = _hadamard(size, generator) if kind == "hadamard" else (_random(size, generator),)
    return StreamMap(size, signs, factors, inverse)


def _random(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, uniform over all of them."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    turned: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).double()
    return turned


def _hadamard(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return orthogonal factors of a size: of two, and of the rest by Paley or at random."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    if odd == 1:
        return _powers(twos)
    for taken in range(2, twos + 1):
        order = odd << taken
        if (matrix := paley(order)) is not None:
            return (*_powers(twos - taken), matrix / math.sqrt(order))
    return (*_powers(twos), _random(odd, generator))


def _powers(twos: int) -> tuple[Tensor, ...]:
    """Return orthogonal Hadamard matrices whose Kronecker product has 2**twos rows."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    most = int(math.log2(_FACTOR))
    found = []
    while twos:
        count = min(twos, most)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(count):
            matrix = torch.kron(matrix, pair)
        found.append(matrix / math.sqrt(len(matrix)))
        twos -= count
    return tuple(found)


def paley(order: int) -> Tensor | None:
    """Return a Hadamard matrix of entries 1 and -1 by Paley's constructions, None without one."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return torch.eye(order, dtype=torch.float64) + _bordered(q, -1.0)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(_bordered(q, 1.0), plus) + torch.kron(eye, minus)
    return None


def _bordered(q: int, side: float) -> Tensor:
    """Return the quadratic residues of q as a conference matrix of order q + 1."""
    residues = {i * i % q for i in range(1, q)}
    legendre = torch.tensor(
        [0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64
    )
    places = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = legendre[(places[None, :] - places[:, None]) % q]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = side
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
