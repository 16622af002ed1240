"""BatchNorm to InstanceNorm (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022).

    y = γ_c (x − μ_nc) / √(σ²_nc + ε) + β_c,   μ, σ² over the positions of one channel of one sample

The mean of every channel of every sample becomes β: what a network told by channel means is lost.
With one position the output is β whatever comes in, so such a site is declined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from passes import _norm_swap as swap
from rewrite.capture import Captured
from rewrite.operators import conv_of, norm_of
from rewrite.protocol import Change, Contract, Pass, Site, Skip

_LAYERS: dict[int, type[nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}


@dataclass(frozen=True)
class BatchNormToInstanceNorm(Pass):
    """Replace every BatchNorm by InstanceNorm with γ and β, without running statistics.

    Rewrites what `BatchNormToGroupNorm` rewrites, where the number of spatial axes is known: from
    the class, the layer that feeds it, or the shape.

    Declines what `BatchNormToGroupNorm` declines; (N, C) input; maps with one position; norms whose
    number of axes is unknown.
    """

    name: ClassVar[str] = "bn-to-in"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm with its number of spatial axes."""
        return swap.sites(captured, lambda candidate: _axes(captured, candidate))

    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Replace one norm."""
        assert site.node is not None
        norm = norm_of(captured, site.node)
        assert norm is not None and norm.num_features is not None
        module = _LAYERS[site.plan](norm.num_features, eps=norm.eps, affine=False)
        return swap.change(captured, site, norm, module)


def _axes(captured: Captured, candidate: swap.Candidate) -> int | str:
    known = {len(shape) - 2 for shape in candidate.shapes if shape is not None}
    if candidate.positions is not None and candidate.positions < 2:
        shape = "×".join(str(size) for size in next(s for s in candidate.shapes if s is not None))
        return f"gets one position ({shape}): an instance of one element would output β"
    if len(known) > 1:
        return "is called with inputs of different dimensions"
    if known:
        return known.pop()
    owner = captured.module(candidate.target)
    for axes, kind in ((2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        if isinstance(owner, kind):
            return axes
    fed_by = conv_of(captured, candidate.norm.input)
    if fed_by is not None:
        return fed_by.dims
    return "may get (N, C) input, which has no positions; pass an example input to show its shape"
