"""BatchNorm to LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450), in its two readings.

    over="chw"   y = γ_c (x − μ) / √(σ² + ε) + β_c,   μ, σ² over all channels and positions of a
                 sample (Wu & He 2018: GroupNorm with one group)
    over="c"     the same with μ, σ² over the channels at each position (ConvNeXt)

On (N, C) input both are `nn.LayerNorm(C)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from passes import _norm_swap as swap
from rewrite.capture import Captured
from rewrite.errors import OptionError
from rewrite.modules import ChannelLayerNorm
from rewrite.operators import norm_of
from rewrite.protocol import Change, Contract, Pass, Site, Skip


@dataclass(frozen=True)
class Layout:
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

    def __post_init__(self) -> None:
        if self.over not in ("chw", "c"):
            raise OptionError(f"{self.name}: over is {self.over!r}; pass 'chw' or 'c'")

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm with what it becomes."""
        return swap.sites(captured, self.layout)

    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Replace one norm."""
        assert site.node is not None
        norm = norm_of(captured, site.node)
        assert norm is not None
        plan: Layout = site.plan
        module: nn.Module
        if issubclass(plan.kind, nn.GroupNorm):
            module = plan.kind(1, plan.num_channels, eps=norm.eps, affine=False)
        else:
            module = plan.kind(plan.num_channels, eps=norm.eps, elementwise_affine=False)
        return swap.change(captured, site, norm, module)

    def layout(self, candidate: swap.Candidate) -> Layout | str:
        """Return what one norm becomes, or why it stays."""
        channels = candidate.num_features
        flat = all(shape is not None and len(shape) == 2 for shape in candidate.shapes)
        if channels == 1 and (self.over == "c" or (candidate.positions or 1) < 2):
            return "has 1 channel: a mean over one element would leave only β"
        if flat:
            return Layout(nn.LayerNorm, channels)
        return Layout(nn.GroupNorm if self.over == "chw" else ChannelLayerNorm, channels)
