"""A linear stream in another basis, in which the groups' means are what varies least.

Where only dense layers and swapped norms write a stream y of C channels, where it is only added up,
and where only dense layers read it, Q y can take its place for any invertible Q: with D diagonal,

    writer   norm(W x + b), scale Γ and bias β    →   T W, T b with T = D⁻¹ Q Γ, then D and Q β
    reader   A y                                  →   (A Q⁻¹) (Q y)

That is exact. What a norm with G groups then takes from y is the mean of each group of Q y, one
functional of the channel means each, the same for all norms of the stream. With M = H² for what the
readers see of an error, S the covariance of the channel means (`rewrite.grouping.fit`), and

    K = Σ H Γ S Γ H = V Λ Vᵀ, Λ rising     Q = B Vᵀ H,   Σ over the norms of the stream

the block of B for a group is a transposed Helmert matrix, which spreads the first of its n inputs
evenly over the group: that one is the group's mean. If the first ones are the G first eigenvectors,
E |H error|² = Λ₁ + … + Λ_G, and no basis loses less (Fan 1949, https://doi.org/10.1073/pnas.35.11.652).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.grouping.fit import NormFit, calls_of, over_channels
from rewrite.grouping.linalg import eigenvectors, square_roots
from rewrite.grouping.permutation import Order, TensorAxis

THROUGH_WEIGHTS = 0.5
"""Part of the covariances that comes from the weights."""


_SEEN = 0.9
"""Part of the metric that comes from the readers; the rest counts all directions alike, which also
bounds how badly Q may be conditioned."""


def can_mix(captured: Captured, order: Order, fits: Sequence[NormFit]) -> bool:
    """Return whether the stream may be in any basis: see above."""
    groups = {fit.probe.groups for fit in fits}
    if not order.linear or len(groups) != 1 or groups.pop() == order.channels:
        return False
    norms = {captured.tree.name(fit.probe.module) for fit in fits}
    if norms != set(order.norms) or not all(writes_alone(captured, fit) for fit in fits):
        return False
    writers = {name for fit in fits for name in _tensors(fit)}
    return all(
        row.side == "reads"
        or (row.ref.owner in norms if row.side == "along" else row.ref.name in writers)
        for row in order.rows
    )


def writes_alone(captured: Captured, fit: NormFit) -> bool:
    """Return whether one dense layer computes the norm's input, and the norm alone reads it."""
    _, inputs = calls_of(captured, fit.probe)
    if fit.kernel is None or fit.plan is None or len(inputs) != 1:
        return False
    norm, value = next(iter(inputs.items()))
    return fit.plan.edits[0].layer.node is value and set(value.users) == {norm}


def write_through(captured: Editable, fit: NormFit, matrix: Tensor) -> None:
    """Let the dense layer in front of a norm write `matrix` times its output.

    Args:
        captured: the model.
        fit: the norm.
        matrix: block by block of consecutive channels, (blocks, n, n).
    """
    for ref in _tensors(fit).values():
        old = captured.tensor(ref).detach()
        rows = old.double().cpu().reshape(len(matrix), matrix.shape[1], -1)
        captured.editor.set_tensor(ref, torch.matmul(matrix, rows).reshape(old.shape).to(old))


def _tensors(fit: NormFit) -> dict[str, TensorRef]:
    """Return weight and bias, by name, of the layer that computes the norm's input."""
    assert fit.plan is not None
    layer = fit.plan.edits[0].layer
    return {ref.name: ref for ref in (layer.weight, layer.bias) if ref is not None}


def seen(captured: Captured, row: TensorAxis, channels: int) -> Tensor:
    """Return what a reader makes of a value that is the same at all positions, (out, C)."""
    weight = over_channels(captured.tensor(row.ref).movedim(row.axis, 0))
    into = torch.zeros(channels, weight.shape[1], dtype=weight.dtype)
    return into.index_add_(0, row.index.cpu(), weight).T


def mix(captured: Editable, order: Order, fits: Sequence[NormFit]) -> None:
    """Bring the stream into the basis that loses least."""
    reads = [row for row in order.rows if row.side == "reads"]
    spread, inverse = _metric(
        [seen(captured, row, order.channels) for row in reads], order.channels
    )
    lost = torch.stack([spread @ _lost(fit) @ spread for fit in fits]).sum(0)
    groups = fits[0].probe.groups
    basis = _grouping(order.channels, groups) @ eigenvectors(lost).T
    forth, back = basis @ spread, inverse @ basis.T
    for fit in fits:
        _write(captured, fit, forth)
    for row in reads:
        old = captured.tensor(row.ref).detach()
        moved = old.double().cpu().movedim(row.axis, -1) @ back
        captured.editor.set_tensor(row.ref, moved.movedim(-1, row.axis).to(old))


def _write(captured: Editable, fit: NormFit, forth: Tensor) -> None:
    """Let the layer in front of a norm write Q y, up to the scale that the norm keeps."""
    scale, bias = fit.probe.scale.cpu(), fit.probe.bias.cpu()
    mixed = forth * scale
    rows = (mixed**2).sum(1).reshape(fit.probe.groups, -1).mean(1, keepdim=True).sqrt()
    sizes = torch.where(rows > 0, rows, 1.0).expand(-1, len(scale) // len(rows)).reshape(-1)
    matrix = mixed / sizes[:, None]
    write_through(captured, fit, matrix[None])
    fit.mix(matrix, sizes, forth @ bias)


def _lost(fit: NormFit) -> Tensor:
    """Return Γ S Γ, (C, C)."""
    scale = fit.probe.scale.cpu()
    return scale[:, None] * fit.shrunk(THROUGH_WEIGHTS)[0] * scale


def _metric(readers: Sequence[Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Return H and its inverse, (C, C)."""
    eye = torch.eye(channels, dtype=torch.float64)
    metric = (1 - _SEEN) * eye
    for weight in readers:
        square = weight.T @ weight
        trace = float(square.trace())
        metric = metric + _SEEN / len(readers) * (square * (channels / trace) if trace > 0 else eye)
    return square_roots(metric, (1 - _SEEN) / 2)


def _grouping(channels: int, groups: int) -> Tensor:
    """Return B: channels of consecutive groups from eigenvectors in rising order, (C, C)."""
    from scipy.linalg import helmert  # Slow to import, and needed for few models.

    size = channels // groups
    kept = np.arange(groups, channels).reshape(size - 1, groups)
    kept[1::2] = kept[1::2, ::-1]  # Each group gets as much of what varies as any other.
    members = np.concatenate([np.arange(groups)[None], kept])
    spread = helmert(size, full=True).T
    matrix = np.zeros((channels, channels))
    for group in range(groups):
        matrix[group * size : (group + 1) * size, members[:, group]] = spread
    return torch.from_numpy(matrix)
