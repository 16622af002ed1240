"""Move channels between the groups of a norm where the graph allows it, without any other change.

    an order that norms share (`rewrite.grouping.permutation`)
        ×  a basis for it, where it is linear (`rewrite.grouping.basis`)
        or which channels a group holds, where there are several (`rewrite.grouping.assignment`)
    →  the same model, whose groups lose less of it

Both need the covariance over all channels, not that within the groups which they happen to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewrite.affine.context import AnalysisContext
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.grouping.assignment import Means, regrouped
from rewrite.grouping.basis import can_mix, mix
from rewrite.grouping.fit import WIDEST, NormFit, calls_of
from rewrite.grouping.permutation import Order, order_of
from rewrite.grouping.statistics import MeanStatistics
from rewrite.outcomes import Declined


@dataclass(frozen=True)
class Shared:
    """An order of channels, the norms that have it, and whether any basis would do as well."""

    order: Order
    fits: tuple[NormFit, ...]
    mixes: bool

    @property
    def groups(self) -> frozenset[int]:
        """The numbers of groups of the norms that can gain from another order."""
        return frozenset(fit.probe.groups for fit in self.fits if _can_gain(fit))


def shared_orders(
    captured: Captured,
    around: AnalysisContext,
    wanted: Sequence[NormFit],
    fits: Sequence[NormFit],
    *,
    bases_only: bool = False,
) -> list[Shared]:
    """Return the orders that can change for the sake of `wanted`, and prepare the norms' sums.

    Args:
        captured: the model.
        around: what surrounds its values.
        wanted: the norms that gain from it.
        fits: all norms that can follow their channels.
        bases_only: whether to leave out orders that are not free to take another basis.
    """
    ours = [fit.probe.module for fit in fits]
    by_module = {id(fit.probe.module): fit for fit in fits}
    found: list[Shared] = []
    met: set[int] = set()
    for fit in wanted:
        if id(fit) in met or not _can_gain(fit) or fit.channels > WIDEST:
            continue
        _, calls = calls_of(captured, fit.probe)
        order = order_of(around, next(iter(calls)), ours) if len(calls) == 1 else Declined("")
        if isinstance(order, Declined):
            continue
        modules = [id(captured.module(name)) for name in order.norms]
        members = tuple(by_module[key] for key in modules if key in by_module)
        one = Shared(order, members, can_mix(captured, order, members))
        met.update(id(member) for member in one.fits)
        if one.mixes or (not bases_only and len(one.groups) == 1 and min(one.groups) > 1):
            found.append(one)
    for one in found:
        for member in one.fits:
            member.varied = MeanStatistics.zeros(member.channels, 1)
    return found


def _can_gain(fit: NormFit) -> bool:
    return fit.probe.groups < fit.channels


def rearrange(captured: Editable, shared: Shared) -> bool:
    """Change the basis or the order of the channels for the better; return whether it was done."""
    channels = shared.order.channels
    order = torch.arange(channels)
    fitted = all(int(fit.plain.count) > 0 for fit in shared.fits)
    if fitted:
        if shared.mixes:
            mix(captured, shared.order, shared.fits)
            return True
        means = [_means(fit) for fit in shared.fits if _can_gain(fit)]
        order = torch.from_numpy(regrouped(means, next(iter(shared.groups))))
        shared.order.apply(captured, order)
    for fit in shared.fits:
        fit.reorder(order)
    return fitted


def _means(fit: NormFit) -> Means:
    weight = fit.weight.numpy()
    return Means(fit.shrunk()[0].numpy(), weight, fit.signed, fit.sized)
