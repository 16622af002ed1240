"""Singular values of the Jacobian between consecutive layers, matrix-free.

    J = dz' / dz,     J^T u by one backward pass,     J v by the backward pass of that

Both walk only the part of the autograd graph between the two layers, so a product costs what those
layers cost, not what the network costs. (`torch.func.jvp` would run the whole forward for each.)
Small layers get the whole spectrum of the explicit matrix. For large ones a few Lanczos steps of
SciPy's on J^T J give the largest singular value (from below, to a few percent) and, by quadrature
from one random start, the mean and the root mean square. (SciPy's `svds` finds the largest alone,
for 2 to 45 times as long.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, funm_multiply_krylov

from rewrite.progress import counted

_DENSE = 256  # elements: up to here the matrix is built and its whole spectrum computed


_STEPS = 8


@dataclass(frozen=True)
class Jacobian:
    """Singular values of a layer's output by the output of the layer `source` before it.

    `mean` and `rms` are over min(rows, columns) values: the zeros of a rectangular matrix do not
    count. rms^2 min(rows, columns) = |J|_F^2.
    """

    source: str
    largest: float
    rms: float
    mean: float


def layer_jacobians(
    outputs: list[tuple[str, torch.Tensor]],
    notes: list[str],
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[int, Jacobian]:
    """Return the Jacobian of each layer's output by that of the nearest layer before it.

    Args:
        outputs: name and output of each layer call, with its autograd graph, in order.
        notes: where to say which could not be computed, and why.
        seed: of the random probes.
        say: called with a line as each begins.
    """
    makers: dict[object, int] = {
        out.grad_fn: i for i, (_, out) in enumerate(outputs) if out.grad_fn is not None
    }
    found: dict[int, Jacobian] = {}
    failures: dict[str, list[str]] = {}
    for number, (name, out) in enumerate(counted(outputs, say, "singular values of layer")):
        source = _layer_before(out, makers, number)
        if source is None:
            continue
        origin, value = outputs[source]
        try:
            found[number] = _measure(origin, value, out, seed)
        except RuntimeError as error:
            # Some fused kernels have no second derivative, which J v needs.
            failures.setdefault(str(error).splitlines()[0], []).append(name)
    for reason, names in failures.items():
        notes.append(f"no Jacobian at {', '.join(names[:5])} ({len(names)}): {reason}")
    return found


def _layer_before(out: torch.Tensor, makers: dict[object, int], number: int) -> int | None:
    """Return the latest layer that feeds `out` with no other layer in between."""
    if out.grad_fn is None:
        return None
    waiting = deque(fn for fn, _ in out.grad_fn.next_functions if fn is not None)
    seen: set[object] = set(waiting)
    before: list[int] = []
    while waiting:
        node = waiting.popleft()
        if node in makers:
            before.append(makers[node])
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    earlier = [i for i in before if i < number]
    return max(earlier, default=None)


def _measure(origin: str, source: torch.Tensor, out: torch.Tensor, seed: int) -> Jacobian:
    if max(source.numel(), out.numel()) <= _DENSE:
        return _dense(origin, source, out)
    rows, columns = out.numel(), source.numel()

    def transposed(u: torch.Tensor) -> torch.Tensor:
        (product,) = torch.autograd.grad(out, source, u.reshape(out.shape), retain_graph=True)
        return product.flatten()

    dummy = torch.zeros_like(out, requires_grad=True)
    (linear,) = torch.autograd.grad(out, source, dummy, create_graph=True)

    def forward(v: torch.Tensor) -> torch.Tensor:
        v = v.reshape(source.shape)
        (product,) = torch.autograd.grad(linear, dummy, v, retain_graph=True)
        return product.flatten()

    # From the smaller side, where one probe sees the larger part of the spectrum.
    product, adjoint = (forward, transposed) if columns <= rows else (transposed, forward)
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(min(rows, columns), generator=random).to(out)
    return Jacobian(origin, *_spectrum(product, adjoint, start))


def _dense(origin: str, source: torch.Tensor, out: torch.Tensor) -> Jacobian:
    rows = []
    for unit in torch.eye(out.numel(), dtype=out.dtype, device=out.device):
        (row,) = torch.autograd.grad(out, source, unit.reshape(out.shape), retain_graph=True)
        rows.append(row.flatten())
    values = torch.linalg.svdvals(torch.stack(rows).double())
    rms = float(values.square().mean().sqrt())
    return Jacobian(origin, float(values[0]), rms, float(values.mean()))


def _spectrum(
    product: Callable[[torch.Tensor], torch.Tensor],
    adjoint: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
) -> tuple[float, float, float]:
    """Return largest, root mean square and mean singular value.

    The expectation of v^T f(J^T J) v over random v of length one is the mean of f over the
    spectrum. SciPy's Lanczos method evaluates f on the projection of J^T J onto a few steps.
    """
    unit = start / start.norm()
    along = float(product(unit).norm())
    # An eigenvector from the start, zero included, leaves Lanczos no second step.
    ritz, weights = np.array([along]), np.ones(1)

    def root(projection: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal ritz, weights
        if not projection.size:
            return np.zeros((0, 1))
        squares, vectors = scipy.linalg.eigh(projection)
        # What rounding of the products cannot tell from zero is zero.
        squares[squares < _STEPS * torch.finfo(start.dtype).eps * squares.max()] = 0.0
        ritz, weights = np.sqrt(squares), vectors[0] ** 2
        return np.asarray((vectors * ritz) @ vectors.T)

    def gram(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return adjoint(product(torch.from_numpy(v.copy()).to(start))).double().cpu().numpy()

    size = start.numel()
    operator = LinearOperator((size, size), matvec=gram, dtype=np.float64)
    if along > 0:
        v = unit.double().cpu().numpy()
        funm_multiply_krylov(
            root, operator, v, assume_a="hermitian", restart_every_m=min(_STEPS, size),
            max_restarts=1,
        )  # fmt: skip
    rms = math.sqrt(float((weights * ritz**2).sum()))
    return float(ritz.max()), rms, float((weights * ritz).sum())
