"""SyncBatchNorm to BatchNorm: the same map in eval mode, the batches of one process in training.

The inverse of `bn-to-sync-bn`: parameters and statistics are the very same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.swap import batch_norms as swap
from rewrite.swap.batch_norms import exchange_class

_LAYERS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


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

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one norm."""
        kind: type[nn.modules.batchnorm._BatchNorm] = site.plan
        return exchange_class(captured, site, kind)


def _layer(
    captured: Captured, candidate: swap.Candidate
) -> type[nn.modules.batchnorm._BatchNorm] | str:
    axes = swap.spatial_axes(captured, candidate)
    return _LAYERS[max(axes, 1)] if isinstance(axes, int) else axes
