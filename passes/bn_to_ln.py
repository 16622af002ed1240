"""BatchNorm to LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450), in its two readings.

    over="chw"   y = γ_c (x − μ) / √(σ² + ε) + β_c,   μ, σ² over all channels and positions of a
                 sample (Wu & He 2018: GroupNorm with one group)
    over="c"     the same with μ, σ² over the channels at each position (ConvNeXt)

On (N, C) input both are `nn.LayerNorm(C)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from rewrite.errors import OptionError
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import Norm
from rewrite.nn.modules import ChannelLayerNorm
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.swap import batch_norms as swap
from rewrite.swap import swap as keeping
from rewrite.swap.keep_function import SwapOptions


@dataclass(frozen=True)
class NormChoice:
    """What a site becomes: the class, and its number of channels."""

    kind: type[nn.GroupNorm] | type[nn.LayerNorm]
    num_channels: int


@dataclass(frozen=True)
class BatchNormToLayerNorm(Pass):
    """Replace every BatchNorm by LayerNorm.

    Rewrites what `BatchNormToGroupNorm` rewrites, to `nn.GroupNorm(1, C)` (over="chw"), to
    `ChannelLayerNorm(C)` (over="c"), or to `nn.LayerNorm(C)` where the input is known to be (N, C).

    Declines what `BatchNormToGroupNorm` declines, and a single channel under over="c".
    """

    name: ClassVar[str] = "bn-to-ln"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    over: str = field(
        default="chw", metadata={"help": "chw: all of a sample; c: the channels at each position"}
    )

    keep: str = field(default="statistics", metadata={"help": keeping.KEEP_HELP})
    anchor: float | None = field(default=None, metadata={"help": keeping.ANCHOR_HELP})

    def __post_init__(self) -> None:
        keeping.check(self.name, self.keep, self.anchor)
        if self.over not in ("chw", "c"):
            raise OptionError(f"{self.name}: over is {self.over!r}; pass 'chw' or 'c'")

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm with what it becomes."""
        return keeping.sites(captured, self.keep, self.layout)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one norm."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Replace all norms; keep="function" fits them in one pass over `calibration`."""
        settings = SwapOptions(self.keep, self.anchor)
        return keeping.swap_all(captured, sites, settings, _make, calibration)

    def layout(self, candidate: swap.Candidate) -> NormChoice | str:
        """Return what one norm becomes, or why it stays."""
        channels = candidate.num_features
        flat = all(shape is not None and len(shape) == 2 for shape in candidate.shapes)
        if channels == 1 and (self.over == "c" or (candidate.positions or 1) < 2):
            return "has 1 channel: a mean over one element would leave only β"
        if flat:
            return NormChoice(nn.LayerNorm, channels)
        return NormChoice(nn.GroupNorm if self.over == "chw" else ChannelLayerNorm, channels)


def _make(site_plan: Any, norm: Norm) -> nn.Module:
    """Return the new norm, without γ and β."""
    plan: NormChoice = site_plan
    if issubclass(plan.kind, nn.GroupNorm):
        return plan.kind(1, plan.num_channels, eps=norm.eps, affine=False)
    return plan.kind(plan.num_channels, eps=norm.eps, elementwise_affine=False)
