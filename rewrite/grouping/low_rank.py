"""A group norm between a low-rank map and its inverse, so that it subtracts what matters least.

An anchored norm of z takes the mean of each group from all of its channels
(`rewrite.grouping.mean_removal`). Between a map M and M⁻¹ the direction that is subtracted can be
chosen. For k groups in a block of channels, with L the channels of each group as columns and
E = L⁺ their means,

    M = I + (L − D)(I − E D)⁻¹ (Qᵀ − E)      M⁻¹ = I − (L − D)(Qᵀ L − I)⁻¹ (Qᵀ − E)      Qᵀ D = I

have M D = L and E M = Qᵀ: the groups of M z have the means Qᵀ z, and what is lost of z is D Qᵀ z̄.
Both are the identity but for rank k, and both are exact. With S the covariance of the channel means
and H² what the norm's readers make of an error, E |H error|² is least for

    K = H S H = V Λ Vᵀ, Λ rising     Q = H V₁…ₖ,   D = H⁻¹ V₁…ₖ     Λ₁ + … + Λₖ

(Fan 1949, https://doi.org/10.1073/pnas.35.11.652); D O, Q O⁻ᵀ do as well for every O, and O is the
one for which M is farthest from singular. A dense layer that the norm alone reads absorbs M.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewrite.affine.context import AnalysisContext
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.grouping.basis import seen, write_through, writes_alone
from rewrite.grouping.fit import WIDEST, NormFit, calls_of
from rewrite.grouping.linalg import eigenvectors, square_roots
from rewrite.grouping.permutation import TensorAxis, order_of
from rewrite.grouping.statistics import MeanStatistics
from rewrite.grouping.swapped_norm import largest_divisor
from rewrite.nn.modules import ChannelMix
from rewrite.outcomes import Declined

_SEEN = 0.9
"""Part of the metric that comes from the readers; the rest is what each activation passes on."""


_FLOOR = 1e-3
"""Least eigenvalue of the metric, as a part of their mean: it bounds how M is conditioned."""


@dataclass(frozen=True)
class Conjugation:
    """A norm that maps can be put around.

    Attributes:
        fit: the norm.
        blocks: how many blocks of groups there are.
        rank: how many groups there are in a block.
        reads: the tensors of the dense layers that read it, through what works channel by channel.
        behind: the norm behind a depthwise layer that reads this one, if there is one.
    """

    fit: NormFit
    blocks: int
    rank: int
    reads: tuple[TensorAxis, ...]
    behind: NormFit | None


def conjugations(
    captured: Captured, around: AnalysisContext, fits: Sequence[NormFit], rank: int
) -> list[Conjugation]:
    """Return the norms that can stand between maps, and prepare their sums.

    Args:
        captured: the model.
        around: what surrounds its values.
        fits: the norms.
        rank: groups in a block at most.
    """
    behind = {id(fit.source): fit for fit in fits if fit.source is not None}
    reads = _reads(captured, around, fits)
    found = []
    for fit in fits:
        groups = fit.probe.groups
        if not isinstance(fit.probe.module, nn.GroupNorm) or groups == fit.channels:
            continue
        size = largest_divisor(groups, max(1, min(rank, WIDEST * groups // fit.channels)))
        blocks = groups // size
        found.append(Conjugation(fit, blocks, size, reads.get(id(fit), ()), behind.get(id(fit))))
    for one in found:
        one.fit.varied = MeanStatistics.zeros(one.fit.channels, one.blocks)
    return found


def _reads(
    captured: Captured, around: AnalysisContext, fits: Sequence[NormFit]
) -> dict[int, tuple[TensorAxis, ...]]:
    """Return the weights of all that reads each norm's channels, where that is dense layers."""
    ours = [fit.probe.module for fit in fits]
    by_module = {id(fit.probe.module): fit for fit in fits}
    found: dict[int, tuple[TensorAxis, ...]] = {}
    for fit in fits:
        _, calls = calls_of(captured, fit.probe)
        if id(fit) in found or len(calls) != 1:
            continue
        order = order_of(around, next(iter(calls)), ours)
        if isinstance(order, Declined):
            continue
        rows = tuple(row for row in order.rows if row.side == "reads")
        for name in order.norms:
            if (member := by_module.get(id(captured.module(name)))) is not None:
                found[id(member)] = rows
    return found


def conjugate(captured: Editable, one: Conjugation) -> tuple[str, ...]:
    """Put maps around the norm; return the layers that absorbed one."""
    probe = one.fit.probe
    assert isinstance(probe.module, nn.GroupNorm)
    maps = low_rank_maps(one.fit.shrunk(), _metric(captured, one), one.rank)
    scale, bias = probe.scale.cpu(), probe.bias.cpu()
    after = _mix(probe.module, scale, bias, maps.down, -scale.reshape(maps.rows) * maps.back)
    _fill(captured, one.fit, maps)
    norm, name = probe.module, captured.tree.name(probe.module)
    parts: OrderedDict[str, nn.Module] = OrderedDict(norm=norm, unmix=after)
    layers: tuple[str, ...] = ()
    if writes_alone(captured, one.fit):
        assert one.fit.plan is not None
        layers = one.fit.plan.layers
        write_through(captured, one.fit, maps.matrix / maps.sizes[..., None])
        sizes = maps.sizes.flatten()
        down = maps.down * maps.sizes[:, None]
        probe.exact = _mix(norm, scale * sizes, bias, down, after.up.detach())
    else:
        inverse = 1 / maps.sizes
        up = inverse[..., None] * maps.up
        before = _mix(norm, inverse.flatten(), torch.zeros_like(bias), maps.down, up)
        parts = OrderedDict(mix=before, **parts)
    probe.module = nn.Sequential(parts)
    captured.editor.replace(name, probe.module)
    return layers


def _mix(norm: nn.Module, *values: Tensor) -> ChannelMix:
    like = norm.weight
    assert isinstance(like, nn.Parameter)
    mix = ChannelMix(*(value.to(like) for value in values))
    return mix.requires_grad_(like.requires_grad).train(norm.training)


def _fill(captured: Editable, fit: NormFit, maps: ConjugationMaps) -> None:
    """Give the norm the weight and bias with which it takes no more than it has to."""
    norm = fit.probe.module
    means = torch.einsum("bkn,bn->bk", maps.functionals, fit.plain.mean.reshape(maps.rows[:2]))
    taken = means.repeat_interleave(maps.size // means.shape[1], dim=1).flatten()
    for key, value in (("weight", fit.probe.gain * maps.sizes.flatten()), ("bias", taken)):
        like = norm.weight
        assert isinstance(like, nn.Parameter)
        captured.editor.write(norm, key, value.to(like), like.requires_grad)


# -- algebra ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConjugationMaps:
    """M = I + up down and M⁻¹ = I − back down, block by block.

    Attributes:
        down: Qᵀ − E, (blocks, k, n).
        up, back: (blocks, n, k).
        functionals: Qᵀ, (blocks, k, n).
    """

    down: Tensor
    up: Tensor
    back: Tensor
    functionals: Tensor

    @property
    def size(self) -> int:
        """The number of channels in a block."""
        return self.up.shape[1]

    @property
    def rows(self) -> tuple[int, int, int]:
        """The shape that brings a vector of all channels into blocks."""
        return (len(self.up), self.size, 1)

    @property
    def matrix(self) -> Tensor:
        """M, (blocks, n, n)."""
        return torch.eye(self.size, dtype=self.up.dtype) + self.up @ self.down

    @property
    def sizes(self) -> Tensor:
        """What divides each channel of M z, so that a group has variance one: (blocks, n)."""
        blocks, size, rank = self.up.shape
        groups = (self.matrix**2).sum(2).reshape(blocks, rank, -1).mean(2)
        return groups.sqrt().clamp(min=1e-6).repeat_interleave(size // rank, dim=1)


def low_rank_maps(covariance: Tensor, metric: Tensor, rank: int) -> ConjugationMaps:
    """Return the maps that lose least.

    Args:
        covariance: of the channel means, block by block, (blocks, n, n).
        metric: H², likewise.
        rank: the number of groups in a block, k; a divisor of n.
    """
    size = covariance.shape[1]
    floor = _FLOOR * metric.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30)
    spread, inverse = square_roots(metric, floor)
    lost = eigenvectors(spread @ covariance @ spread)[:, :, :rank]
    left, right = spread @ lost, inverse @ lost  # Q, D
    groups = torch.eye(rank, dtype=lost.dtype).repeat_interleave(size // rank, dim=0)  # L
    means = groups.T * (rank / size)  # E
    # Columns as large as those of L, turned away from them.
    scale = (size / right.square().sum((1, 2))).sqrt()[:, None, None]
    toward = scale * (means @ right) + (left.mT @ groups).mT / scale
    u, _, v = torch.linalg.svd(toward)
    turn = -(u @ v).mT
    right, left = scale * right @ turn, left @ turn / scale
    eye = torch.eye(rank, dtype=lost.dtype)
    down, apart = left.mT - means, groups - right
    up = apart @ torch.linalg.inv(eye - means @ right)
    back = apart @ torch.linalg.inv(left.mT @ groups - eye)
    return ConjugationMaps(down, up, back, left.mT)


def _metric(captured: Captured, one: Conjugation) -> Tensor:
    """Return H², (blocks, n, n): what an error of z does to the readers, or else to the output."""
    fit = one.fit
    own = fit.weight.reshape(one.blocks, -1)
    metric = torch.diag_embed(own**2)
    weight = own
    if one.behind is not None and (slopes := one.behind.slopes()) is not None:
        weight = slopes * one.behind.weight.reshape(one.blocks, -1)
    for row in one.reads:
        sees = seen(captured, row, fit.channels)
        rows = weight[:, None] * sees.reshape(len(sees), one.blocks, -1).movedim(1, 0)
        square = rows.mT @ rows
        trace = square.diagonal(dim1=1, dim2=2).sum()
        if float(trace) > 0:
            part = _SEEN / len(one.reads) * float((own**2).sum() / trace)
            metric = metric + part / (1 - _SEEN) * square
    return metric
