"""BatchNorm to SyncBatchNorm: the same map in eval mode, other batches in training.

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

from torch import nn

from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.swap import batch_norms as swap
from rewrite.swap.batch_norms import exchange_class


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

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one norm."""
        return exchange_class(captured, site, nn.SyncBatchNorm)
