"""BatchNorm to InstanceNorm (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022).

    y = γ_c (x − μ_nc) / √(σ²_nc + ε) + β_c,   μ, σ² over the positions of one channel of one sample

The mean of every channel of every sample becomes β: what a network told by channel means is lost.
With one position the output is β whatever comes in, so such a site is declined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import Norm
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.swap import batch_norms as swap
from rewrite.swap import swap as keeping
from rewrite.swap.keep_function import SwapOptions

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

    keep: str = field(default="statistics", metadata={"help": keeping.KEEP_HELP})
    anchor: float | None = field(default=None, metadata={"help": keeping.ANCHOR_HELP})

    def __post_init__(self) -> None:
        keeping.check(self.name, self.keep, self.anchor)

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm with its number of spatial axes."""
        return keeping.sites(captured, self.keep, lambda candidate: _axes(captured, candidate))

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one norm."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Replace all norms; keep="function" fits them in one pass over `calibration`."""
        settings = SwapOptions(self.keep, self.anchor)
        return keeping.swap_all(captured, sites, settings, _make, calibration)


def _make(site_plan: Any, norm: Norm) -> nn.Module:
    """Return the new norm, without γ and β."""
    assert norm.num_features is not None
    return _LAYERS[site_plan](norm.num_features, eps=norm.eps, affine=False)


def _axes(captured: Captured, candidate: swap.Candidate) -> int | str:
    if candidate.positions is not None and candidate.positions < 2:
        shape = "×".join(str(size) for size in next(s for s in candidate.shapes if s is not None))
        return f"gets one position ({shape}): an instance of one element would output β"
    return swap.spatial_axes(captured, candidate)
