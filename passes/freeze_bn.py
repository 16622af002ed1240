"""BatchNorm to a frozen affine map per channel.

    y = γ (x − μ) / √(σ² + ε) + β  =  s·x + t,   s = γ / √(σ² + ε),  t = β − s μ

In eval mode that is what a BatchNorm computes, for every input. In train mode the frozen one goes
on computing it: no batch statistics, nothing to update, no gradient to s and t. (For detection
heads and small batches; torchvision's `FrozenBatchNorm2d` is the same map with four buffers.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from rewrite.affine.algebra import Affine
from rewrite.affine.tensor_readers import TensorReaders
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import norm_of
from rewrite.nn.modules import ChannelAffine
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.swap import batch_norms as swap


@dataclass(frozen=True)
class FreezeBatchNorm(Pass):
    """Replace every BatchNorm by the affine map that it is in eval mode.

    Rewrites what `BatchNormToGroupNorm` rewrites. Declines what it declines, norms without running
    statistics, norms whose scale is not finite, and norms whose weight or bias code reads.
    """

    name: ClassVar[str] = "freeze-bn"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    trainable: bool = field(
        default=False, metadata={"help": "let scale and shift be trained (statistics stay frozen)"}
    )

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm that has statistics."""
        readers = TensorReaders(captured)
        return swap.sites(captured, lambda candidate: _plan(captured, readers, candidate))

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one norm."""
        assert site.node is not None
        norm = norm_of(captured, site.node)
        assert norm is not None and norm.running_mean is not None
        affine: Affine = site.plan
        like = captured.tensor(norm.weight or norm.running_mean)
        module = ChannelAffine(affine.scale.to(like), affine.shift.to(like))
        module.requires_grad_(self.trainable)
        name, kept = swap.install(captured, norm, module)
        captured.keep_exact({f"{name}.weight": lambda: affine.scale})
        captured.keep_exact({f"{name}.bias": lambda: affine.shift})
        after = f"ChannelAffine({len(affine.scale)})"
        return Change(site.target, site.before, after, kept, (site.target, name))


def _plan(captured: Captured, readers: TensorReaders, candidate: swap.Candidate) -> Affine | str:
    norm = candidate.norm
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics to freeze"
    weight, bias = (None if r is None else captured.tensor(r) for r in (norm.weight, norm.bias))
    mean, var = captured.tensor(norm.running_mean), captured.tensor(norm.running_var)
    if (reader := swap.reader_of(captured, readers, norm)) is not None:
        return reader
    affine = Affine.batch_norm(mean, var, weight, bias, norm.eps)
    if affine.scale.is_meta:
        return affine
    if not bool(torch.isfinite(affine.scale).all() and torch.isfinite(affine.shift).all()):
        return "its scale or shift is not finite"
    return affine
