"""Fitting swapped norms to data, so that the model keeps its function.

The converted model is two models at once. Each new norm reads z, the standardized channels, so

    y = γ z + β       in place of each norm: the original model, exactly
    y = n(z)          the converted model

and one pass over the data with the first gives the channel means that
`rewrite.grouping.mean_removal` fits to. Then channels change groups, or a stream its basis, where
the graph allows it (`rewrite.grouping.regroup`, `rewrite.grouping.basis`), each producer is given
the factors, each norm the inverse, and the held-out samples run through both, value by value, to
say how far they are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.affine.algebra import Affine
from rewrite.affine.ledger import Ledger
from rewrite.affine.plan import Absorption, write_tensor
from rewrite.affine.planner import Planner
from rewrite.calibration.batches import Batches
from rewrite.graph.capture import capture
from rewrite.graph.editable import Editable
from rewrite.grouping.fit import NormFit, collect, fits_of
from rewrite.grouping.low_rank import Conjugation, conjugate, conjugations
from rewrite.grouping.mean_removal import RANGE, factors
from rewrite.grouping.regroup import Shared, rearrange, shared_orders
from rewrite.grouping.statistics import MeanStatistics
from rewrite.grouping.swapped_norm import SwappedNorm
from rewrite.nn.modules import ChannelAffine
from rewrite.runtime.modes import evaluating
from rewrite.swap.agreement import Agreement, measure

SIZES_FROM = 3.0
"""Gain of the anchor from which on factors of unequal size pay: below it they unbalance the
variance that the norm divides by, and only signs are fitted; so do maps."""


@dataclass(frozen=True)
class SwapOptions:
    """How a swap keeps the function.

    Attributes:
        keep: what of it.
        anchor: None for the default.
        mix: how many groups the maps around a norm mix; 0 for no maps.
    """

    keep: str
    anchor: float | None = None
    mix: int = 0


@dataclass(frozen=True)
class FitResult:
    """What the fit did at one norm."""

    note: str
    touched: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def keep_function(
    model: nn.Module, probes: Sequence[SwappedNorm], calibration: Iterable[Any], mix: int = 0
) -> tuple[list[FitResult], Agreement]:
    """NormFit the new norms of `model` to `calibration`, in place.

    Args:
        model: the converted model.
        probes: its new norms.
        calibration: batches.
        mix: groups that the maps around a norm mix, at most; 0 for no maps.

    Returns:
        What was done at each norm, and how the model agrees with the original on what was held out.

    Raises:
        OptionError: nothing in the data can be used, or it was interrupted.
    """
    batches = Batches(model, calibration)
    fitted = [probe for probe in probes if probe.standardized]
    captured = capture(model)
    planner = Planner(captured)
    with evaluating(model), torch.no_grad():
        fits = fits_of(captured, planner, fitted)
        sized = [fit for fit in fits if fit.probe.gain > SIZES_FROM]
        shared = shared_orders(captured, planner.context, sized, fits, bases_only=mix > 0)
        free = [fit for fit in sized if not any(fit in one.fits for one in shared)]
        mapped = conjugations(captured, planner.context, free, mix) if mix else []
        collect(model, fits, batches)
        shared = [one for one in shared if rearrange(captured, one)]
        notes = _apply(captured, fits, shared, mapped)
        agreement = measure(model, probes, batches)
    kept = []
    for probe in probes:
        note, touched = notes.get(probe.target, ("not fitted", ()))
        if mix and probe.standardized and probe.gain <= SIZES_FROM:
            note += "; no maps around it: its anchor is too small"
        kept.append(FitResult(note, touched, agreement.layers.get(probe.target, {})))
    return kept, agreement


# -- applying ---------------------------------------------------------------------------------


def _apply(
    captured: Editable,
    fits: Sequence[NormFit],
    shared: Sequence[Shared],
    mapped: Sequence[Conjugation],
) -> dict[str, tuple[str, tuple[str, ...]]]:
    maps = {id(one.fit): one for one in mapped}
    moved = {id(fit): one for one in shared for fit in one.fits}
    ledger = Ledger(captured.tensor)
    outcomes: dict[str, tuple[str, tuple[str, ...]]] = {}
    for fit in fits:
        probe = fit.probe
        if int(fit.plain.count) == 0:
            outcomes[probe.target] = ("not fitted: no finite sample reached it", ())
            continue
        if (around := maps.get(id(fit))) is not None:
            outcomes[probe.target] = _conjugate(captured, around)
            continue
        factor = torch.ones_like(probe.scale)
        if fit.sized and not fit.mixed:
            factor = _factors(fit)
        touched = _scale_producers(captured, probe, fit.plan, factor, ledger)
        _scale_norm(captured, probe, factor, fit.plain)
        note = _note(probe, fit.plan)
        if (one := moved.get(id(fit))) is not None:
            touched = tuple(dict.fromkeys((*touched, *one.order.layers)))
            done = "in another basis" if fit.mixed else "regrouped"
            note += f"; channels {done}, in {len(one.order.layers)} layers alike"
        outcomes[probe.target] = (note, touched)
    ledger.write(lambda layer, attr, new: write_tensor(captured.editor, layer, attr, new))
    captured.editor.commit()
    return outcomes


def _conjugate(captured: Editable, one: Conjugation) -> tuple[str, tuple[str, ...]]:
    layers = conjugate(captured, one)
    place = f"behind it and in {', '.join(layers)}" if layers else "around it"
    return f"maps of rank {one.rank} {place}, {one.blocks} blocks of channels", layers


def _factors(fit: NormFit) -> Tensor:
    weight = fit.weight.reshape(fit.probe.groups, -1).numpy()
    sizes = RANGE if fit.probe.gain > SIZES_FROM else 1.0
    covariance = fit.covariance().numpy()
    found = factors(covariance, weight, signed=fit.signed, sizes=sizes, shrinkage=fit.shrinkage)
    return torch.from_numpy(found).reshape(-1).to(fit.probe.scale.device)


def _scale_producers(
    captured: Editable, probe: SwappedNorm, plan: Absorption | None, factor: Tensor, ledger: Ledger
) -> tuple[str, ...]:
    if probe.prefix is not None:
        assert isinstance(probe.prefix, ChannelAffine)
        for key in ("weight", "bias"):
            old = getattr(probe.prefix, key)
            captured.editor.write(probe.prefix, key, (old.double() * factor).to(old))
        return ()
    if plan is None:
        return ()
    plan.enter(ledger, Affine(factor, torch.zeros_like(factor)))
    return plan.layers


def _scale_norm(
    captured: Editable, probe: SwappedNorm, factor: Tensor, statistics: MeanStatistics
) -> None:
    """Divide the norm's weight by the factors and give its bias the mean that it will take."""
    module = probe.module
    means = (statistics.mean.reshape(-1).to(factor) * factor).reshape(probe.groups, -1)
    taken = means.mean(1, keepdim=True).expand_as(means).reshape(-1)
    probe.scale = probe.scale / factor
    bias = probe.bias + probe.scale * taken
    for key, value in (("weight", probe.scale * probe.gain), ("bias", bias)):
        held = getattr(module, key)
        like = held if held is not None else module.weight
        assert isinstance(like, nn.Parameter)
        captured.editor.write(module, key, value.to(like), like.requires_grad)


def _note(probe: SwappedNorm, plan: Absorption | None) -> str:
    if probe.groups == len(probe.scale):
        return "the mean of each channel is lost: one channel a group"
    if plan is None and probe.prefix is None:
        return "only β fitted: no layer can absorb factors"
    return "factors and β fitted"
