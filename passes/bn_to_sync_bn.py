"""BatchNorm to SyncBatchNorm and back: the same map in eval mode, other batches in training.

    BatchNorm      μ, σ² of the batch of one process
    SyncBatchNorm  μ, σ² of the batches of all processes of a group

Parameters and statistics are the very same tensors. In eval mode, and in one process, both compute
the same. `nn.SyncBatchNorm.convert_sync_batchnorm` replaces by `isinstance` and loses what a
subclass does beside normalizing (an activation, say); here such a norm keeps its own forward, and
the line that normalizes becomes a child.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from passes import _norm_swap as swap
from rewrite.capture import Captured
from rewrite.operators import Norm, norm_of
from rewrite.protocol import Change, Contract, Pass, Site, Skip

_LAYERS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


@dataclass(frozen=True)
class BatchNormToSyncBatchNorm(Pass):
    """Replace every BatchNorm by SyncBatchNorm, with the same parameters and statistics.

    Rewrites what `BatchNormToGroupNorm` rewrites, except what is a SyncBatchNorm already. Declines
    what it declines.
    """

    name: ClassVar[str] = "bn-to-sync-bn"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm that is no SyncBatchNorm yet."""
        return (
            site
            for site in swap.sites(captured, lambda candidate: candidate)
            if not isinstance(captured.module(site.target), nn.SyncBatchNorm)
        )

    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Replace one norm."""
        return _exchange(captured, site, nn.SyncBatchNorm)


@dataclass(frozen=True)
class SyncBatchNormToBatchNorm(Pass):
    """Replace every SyncBatchNorm by BatchNorm1d, 2d or 3d, with the same tensors.

    Declines what `BatchNormToGroupNorm` declines, and norms whose number of axes is unknown.
    """

    name: ClassVar[str] = "sync-bn-to-bn"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every SyncBatchNorm with the class that it becomes."""
        return (
            site
            for site in swap.sites(captured, lambda candidate: _layer(captured, candidate))
            if isinstance(captured.module(site.target), nn.SyncBatchNorm)
        )

    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Replace one norm."""
        kind: type[nn.modules.batchnorm._BatchNorm] = site.plan
        return _exchange(captured, site, kind)


def _layer(
    captured: Captured, candidate: swap.Candidate
) -> type[nn.modules.batchnorm._BatchNorm] | str:
    axes = swap.spatial_axes(captured, candidate)
    return _LAYERS[max(axes, 1)] if isinstance(axes, int) else axes


def _exchange(
    captured: Captured, site: Site, kind: type[nn.modules.batchnorm._BatchNorm]
) -> Change:
    assert site.node is not None
    norm = norm_of(captured, site.node)
    assert norm is not None and norm.num_features is not None
    tracks = norm.running_mean is not None
    with torch.device("meta"):
        module = kind(
            norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=tracks
        )
    swap.dress(captured, norm, module)
    _give_statistics(captured, norm, module)
    name, kept = swap.place(captured, norm, module)
    after = f"{kind.__name__}({norm.num_features})"
    return Change(site.target, site.before, after, kept, (site.target, name))


def _give_statistics(captured: Captured, norm: Norm, module: nn.Module) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    module.register_buffer("running_mean", captured.tensor(norm.running_mean))
    module.register_buffer("running_var", captured.tensor(norm.running_var))
    owner = captured.module(norm.running_mean.owner)
    counter = getattr(owner, "num_batches_tracked", None)
    if not isinstance(counter, torch.Tensor):
        device = captured.tensor(norm.running_mean).device
        counter = torch.zeros((), dtype=torch.long, device=device)
    module.register_buffer("num_batches_tracked", counter)
