"""BatchNorm to GroupNorm (Wu & He 2018, https://arxiv.org/abs/1803.08494).

GroupNorm splits the C channels of one sample into G groups of consecutive channels:

    y = γ (x − μ_g) / √(σ²_g + ε) + β,   μ_g, σ²_g over all channels and positions of group g

It computes nothing across the batch. A group loses its mean: where the function is to be kept, one
group a layer is the default (docs/norm_swaps.md has the dial, measured). With one element a group
(x − μ_g) is zero and the output is β whatever comes in, so a group never has fewer than two here.
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
from rewrite.grouping.swapped_norm import largest_divisor
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.swap import batch_norms as swap
from rewrite.swap import swap as keeping
from rewrite.swap.anchor import gain
from rewrite.swap.keep_function import SIZES_FROM, SwapOptions

_TRAINED_ANEW = 32
"""Groups of a norm that keeps no function (Wu & He 2018)."""


@dataclass(frozen=True)
class Groups:
    """How many groups a site gets, and what to say about it."""

    num_groups: int
    num_channels: int
    note: str = ""


@dataclass(frozen=True)
class BatchNormToGroupNorm(Pass):
    """Replace every BatchNorm by GroupNorm.

    Rewrites:
      1. BatchNorm1d/2d/3d and SyncBatchNorm, lazy ones that have been materialized, and subclasses
         that inherit their forward: the module is replaced, under every name.
      2. Subclasses with a forward of their own and functional calls (`F.batch_norm`, `aten`): the
         line is replaced, the rest of that forward is kept.

    Declines: norms with hooks or parametrizations; lazy norms without input; quantized ones; lines
    of a forward that cannot be traced; a single channel where the number of positions is unknown or
    one; statistics to keep that hold a NaN or a negative variance.
    """

    name: ClassVar[str] = "bn-to-gn"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    num_groups: int | None = field(
        default=None,
        metadata={
            "help": "groups a layer at most (default 1, which keeps most of the model; "
            "32 with min_channels and for keep=affine, nothing)"
        },
    )
    channels_per_group: int | None = field(
        default=None, metadata={"help": "channels a group, instead of num_groups"}
    )
    min_channels: int | None = field(
        default=None,
        metadata={"help": "channels a group at least: narrow layers get fewer groups"},
    )
    strict: bool = field(
        default=False, metadata={"help": "an error where the count does not divide the channels"}
    )

    keep: str = field(default="statistics", metadata={"help": keeping.KEEP_HELP})
    anchor: float | None = field(default=None, metadata={"help": keeping.ANCHOR_HELP})
    mix: int = field(
        default=0,
        metadata={
            "help": "maps around each norm mix so many groups, so that less is lost (function)"
        },
    )

    def __post_init__(self) -> None:
        keeping.check(self.name, self.keep, self.anchor)
        for option in ("num_groups", "channels_per_group", "min_channels"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{self.name}: {option} is {value}; pass 1 or more")
        if self.num_groups is not None and self.channels_per_group is not None:
            raise OptionError(f"{self.name}: pass num_groups or channels_per_group, not both")
        if self.channels_per_group is not None and self.min_channels is not None:
            raise OptionError(f"{self.name}: min_channels goes with num_groups")
        if self.mix < 0:
            raise OptionError(f"{self.name}: mix is {self.mix}; pass 0 or more")
        if self.mix and self.keep != "function":
            raise OptionError(f"{self.name}: mix goes with keep=function, not {self.keep}")
        if self.mix and self.anchor is not None and gain(self.anchor) <= SIZES_FROM:
            raise OptionError(
                f"{self.name}: mix needs an anchor above 2.83, for which groups keep their variance"
            )

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm with its number of groups."""
        return keeping.sites(captured, self.keep, self.groups)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one norm."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Replace all norms; keep="function" fits them in one pass over `calibration`.

        Hidden channels may change their order then, so that the groups lose less of the model; with
        `mix`, maps stand around the norms instead (`rewrite.grouping.low_rank`).
        """
        settings = SwapOptions(self.keep, self.anchor, self.mix)
        return keeping.swap_all(captured, sites, settings, _make, calibration)

    def groups(self, candidate: swap.Candidate) -> Groups | str:
        """Return the groups for one norm, or why there are none.

        Raises:
            OptionError: `strict`, and the number of groups does not divide the channels.
        """
        channels, positions = candidate.num_features, candidate.positions
        wanted, asked = self._wanted(channels)
        if channels % wanted and self.strict:
            fitting = largest_divisor(channels, wanted)
            raise OptionError(
                f"{candidate.target}: {channels} channels are not divisible by {asked}; "
                f"pass num_groups={fitting}"
            )
        if channels == 1 and (positions or 1) < 2:
            where = "one position" if positions == 1 else "an unknown number of positions"
            return f"has 1 channel and {where}: a group of one element would output β"
        fewest = max(2 if positions is None or positions < 2 else 1, self._least)
        count = largest_divisor(channels, min(wanted, max(1, channels // fewest)))
        note = "" if count == wanted else f"{asked} asked, {count} fit {channels} channels"
        if note and self._least > 1:
            note += f" with at least {self._least} a group"
        return Groups(count, channels, note)

    @property
    def _least(self) -> int:
        return 1 if self.min_channels is None else self.min_channels

    def _wanted(self, channels: int) -> tuple[int, str]:
        if self.channels_per_group is not None:
            size = self.channels_per_group
            count = max(1, channels // size)
            return count, f"groups of {size} channels"
        keeps = self.keep in keeping.DEFAULT_ANCHOR and self.min_channels is None
        groups = self.num_groups or (1 if keeps else _TRAINED_ANEW)
        return groups, f"{groups} groups"


def _make(site_plan: Any, norm: Norm) -> nn.Module:
    """Return the new norm, without γ and β."""
    plan: Groups = site_plan
    return nn.GroupNorm(plan.num_groups, plan.num_channels, eps=norm.eps, affine=False)
