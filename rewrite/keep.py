"""Fitting swapped norms to data, so that the model keeps its function.

The converted model is two models at once. Each new norm reads z, the standardized channels, so

    y = γ z + β       in place of each norm: the original model, exactly
    y = n(z)          the converted model

and one pass over the data with the first gives the channel means that `rewrite.mean_leak` fits to.
Then each producer is given the factors, each norm the inverse, and the held-out samples run through
both, value by value, to say how far they are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.absorb import Ledger
from rewrite.absorption import Absorption, write_tensor
from rewrite.affine import Planner
from rewrite.algebra import Affine
from rewrite.calibrate import Batches, MeanStatistics, hooked, in_eval_mode, run, variations
from rewrite.capture import Captured, capture
from rewrite.errors import OptionError
from rewrite.held_out import Agreement, measure
from rewrite.mean_leak import RANGE, SHRINKAGE, factors
from rewrite.modules import ChannelAffine
from rewrite.operators import norm_of

THROUGH_WEIGHTS = 0.7
"""Part of a covariance that comes from the weights."""

_SIZES_FROM = 3.0
"""Gain of the anchor from which on factors of unequal size pay: below it they unbalance the
variance that the norm divides by, and only signs are fitted."""


@dataclass(frozen=True)
class Settings:
    """How a swap keeps the function: what of it, and the anchor (None: the default)."""

    keep: str
    anchor: float | None = None


@dataclass(eq=False)
class Probe:
    """A new norm, and the old function in terms of its input: y = scale·z + bias.

    Attributes:
        target: the name to report.
        module: the new norm.
        scale, bias: γ and β of the old norm, in float64; scale is divided by what z is multiplied.
        gain: what the anchor multiplied the new norm's weight by.
        prefix: the channel affine in front of it, if there is one.
        standardized: whether its input is standardized.
    """

    target: str
    module: nn.Module
    scale: Tensor
    bias: Tensor
    gain: float = 1.0
    prefix: nn.Module | None = None
    standardized: bool = True

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return -1 if type(self.module) is nn.LayerNorm else 1

    @property
    def groups(self) -> int:
        """How many means the norm takes of one sample."""
        if isinstance(self.module, nn.GroupNorm):
            return self.module.num_groups
        return 1 if isinstance(self.module, nn.LayerNorm) else len(self.scale)

    def old(self, z: Tensor) -> Tensor:
        """Return what the old norm returned."""
        shape = [1] * z.dim()
        shape[self.axis] = -1
        return torch.addcmul(self.bias.to(z).reshape(shape), z, self.scale.to(z).reshape(shape))

    def means(self, z: Tensor) -> Tensor:
        """Return what the norm takes a group's mean of, (samples, channels)."""
        if isinstance(self.module, nn.LayerNorm):
            return z.movedim(self.axis, -1).reshape(-1, len(self.scale))
        return z.flatten(2).mean(2) if z.dim() > 2 else z


@dataclass(frozen=True)
class Kept:
    """What the fit did at one norm."""

    note: str
    touched: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def keep_function(
    model: nn.Module, probes: Sequence[Probe], calibration: Iterable[Any]
) -> tuple[list[Kept], Agreement]:
    """Fit the new norms of `model` to `calibration`, in place.

    Returns:
        What was done at each norm, and how the model agrees with the original on what was held out.

    Raises:
        OptionError: nothing in the data can be used, or it was interrupted.
    """
    batches = Batches(model, calibration)
    fitted = [probe for probe in probes if probe.standardized]
    captured = capture(model)
    planner = Planner(captured)
    with in_eval_mode(model), torch.no_grad():
        fits = [_fit_of(captured, planner, probe) for probe in fitted]
        collect(model, fits, batches)
        notes = _apply(captured, fits)
        agreement = measure(model, probes, batches)
    kept = []
    for probe in probes:
        note, touched = notes.get(probe.target, ("not fitted", ()))
        kept.append(Kept(note, touched, agreement.layers.get(probe.target, {})))
    return kept, agreement


@dataclass(eq=False)
class Fit:
    """One norm on its way to its factors.

    Attributes:
        plan: the layers that can take up factors, if there are any.
        signed: whether factors may be negative.
        kernel: weight of the one layer that produces the norm's input, summed over its taps.
        reads: the module of that layer.
        plain, varied: sums over the calibration data, and over variations of it as well.
        inputs: sums over what that layer reads, per channel.
    """

    probe: Probe
    plan: Absorption | None
    signed: bool
    kernel: Tensor | None
    reads: nn.Module | None
    plain: MeanStatistics
    varied: MeanStatistics
    inputs: MeanStatistics | None


def _fit_of(captured: Captured, planner: Planner, probe: Probe) -> Fit:
    plan, signed = _plan(captured, planner, probe)
    kernel, reads = _kernel(captured, plan)
    channels, groups = len(probe.scale), probe.groups
    wide = None if kernel is None else MeanStatistics.zeros(kernel.shape[1], kernel.shape[1])
    return Fit(
        probe, plan, signed, kernel, reads,
        MeanStatistics.zeros(channels, groups), MeanStatistics.zeros(channels, groups), wide,
    )  # fmt: skip


def _kernel(captured: Captured, plan: Absorption | None) -> tuple[Tensor | None, nn.Module | None]:
    """Return the weight, over channels, of the one dense layer in front of a norm, if it is so."""
    if plan is None or len(plan.edits) != 1:
        return None, None
    layer = plan.edits[0].layer
    if layer.kind != "kernel" or layer.module is None or layer.weight is None:
        return None, None
    if layer.layout.groups != 1 or layer.layout.transposed:
        return None, None
    if not torch.equal(plan.edits[0].index.cpu(), torch.arange(layer.channels_out)):
        return None, None
    weight = captured.tensor(layer.weight).detach().double().cpu()
    return weight.flatten(2).sum(2) if weight.dim() > 2 else weight, captured.module(layer.module)


def collect(model: nn.Module, fits: Sequence[Fit], batches: Batches) -> None:
    """Sum up the original model's channel means at each norm, in one pass over the data."""
    plain = True

    def at_norm(index: int, z: Tensor, output: Tensor) -> Tensor:
        fit = fits[index]
        means = fit.probe.means(z)
        fit.varied.add(means)
        if plain:
            fit.plain.add(means)
        return fit.probe.old(z)

    reading = [fit for fit in fits if fit.reads is not None]

    def at_kernel(index: int, x: Tensor, output: Tensor) -> None:
        fit = reading[index]
        assert fit.inputs is not None
        axis = -1 if isinstance(fit.reads, nn.Linear) else 1
        moved = x.movedim(axis, 1) if x.dim() > 1 else x[None]
        fit.inputs.add(moved.flatten(2).mean(2) if moved.dim() > 2 else moved)

    norms = [fit.probe.module for fit in fits]
    kernels = [fit.reads for fit in reading if fit.reads is not None]
    try:
        with hooked(norms, at_norm), hooked(kernels, at_kernel):
            for batch in batches:
                plain = True
                run(model, batch)
                plain = False
                for variation in variations(batch):
                    run(model, variation)
    except KeyboardInterrupt as error:
        raise OptionError(
            f"calibration was interrupted after {batches.seen} samples; nothing was fitted"
        ) from error
    for fit in fits:
        for item in (fit.plain, fit.varied, fit.inputs):
            if item is not None:
                item.reduce()


# -- applying ---------------------------------------------------------------------------------


def _apply(captured: Captured, fits: Sequence[Fit]) -> dict[str, tuple[str, tuple[str, ...]]]:
    ledger = Ledger(captured.tensor)
    outcomes: dict[str, tuple[str, tuple[str, ...]]] = {}
    for fit in fits:
        probe = fit.probe
        if int(fit.plain.count) == 0:
            outcomes[probe.target] = ("not fitted: no finite sample reached it", ())
            continue
        factor = torch.ones_like(probe.scale)
        if fit.plan is not None or probe.prefix is not None:
            factor = _factors(fit)
        touched = _scale_producers(probe, fit.plan, factor, ledger)
        _scale_norm(probe, factor, fit.plain)
        outcomes[probe.target] = (_note(probe, fit.plan), touched)
    ledger.write(lambda layer, attr, new: write_tensor(captured.editor, layer, attr, new))
    captured.editor.commit()
    return outcomes


def _plan(captured: Captured, planner: Planner, probe: Probe) -> tuple[Absorption | None, bool]:
    """Return who takes up factors of the norm's input, and whether they may be negative."""
    if probe.prefix is not None or probe.groups == len(probe.scale):
        return None, True
    name = captured.tree.name(probe.module)
    if captured.unknown_caller(name) is not None:
        return None, True
    axis, inputs = _inputs(captured, name, probe)
    if not inputs:
        return None, True
    for positive in (False, True):
        plan = planner.backward(inputs, axis, len(probe.scale), shift=False, positive=positive)
        if isinstance(plan, Absorption):
            return plan, not positive
    return None, True


def _inputs(captured: Captured, name: str, probe: Probe) -> tuple[int, dict[Node, Node]]:
    """Return the axis of the channels and the input of each call of a norm."""
    calls = captured.calls(name)
    if calls:
        return probe.axis, {node: node.all_input_nodes[0] for node in calls}
    # A norm with a forward of its own is looked into: its calls are those of the line within.
    within = [node for node in captured.nodes() if captured.owner(node) == name]
    norms = [norm for node in within if (norm := norm_of(captured, node)) is not None]
    return (norms[0].channel_axis if norms else probe.axis), {n.node: n.input for n in norms}


def _factors(fit: Fit) -> Tensor:
    groups = fit.plain.groups
    weight = fit.probe.scale.cpu().reshape(groups, -1).numpy()
    covariance = fit.varied.covariance
    if fit.kernel is not None and fit.inputs is not None:
        covariance = through_weights(covariance, fit.kernel, fit.inputs.covariance.flatten())
    sizes = RANGE if fit.probe.gain > _SIZES_FROM else 1.0
    found = factors(
        covariance.numpy(), weight, signed=fit.signed, sizes=sizes,
        shrinkage=SHRINKAGE if fit.kernel is None else SHRINKAGE / 3,
    )  # fmt: skip
    return torch.from_numpy(found).reshape(-1).to(fit.probe.scale.device)


def through_weights(covariance: Tensor, kernel: Tensor, variance: Tensor) -> Tensor:
    """Mix a covariance of channel means with the one that independent inputs would give.

        (1 − r) S + r W D Wᵀ,   D the variances of the input's channel means

    A hundred samples span few directions; the weights know how all others would come out.
    """
    size = covariance.shape[1]
    rows = kernel.reshape(-1, size, kernel.shape[1])
    prior = torch.einsum("gik,k,gjk->gij", rows, variance, rows)
    return (1 - THROUGH_WEIGHTS) * covariance + THROUGH_WEIGHTS * prior


def _scale_producers(
    probe: Probe, plan: Absorption | None, factor: Tensor, ledger: Ledger
) -> tuple[str, ...]:
    if probe.prefix is not None:
        assert isinstance(probe.prefix, ChannelAffine)
        for key in ("weight", "bias"):
            old = getattr(probe.prefix, key)
            new = nn.Parameter((old.double() * factor).to(old), requires_grad=old.requires_grad)
            probe.prefix.register_parameter(key, new)
        return ()
    if plan is None:
        return ()
    plan.enter(ledger, Affine(factor, torch.zeros_like(factor)))
    return plan.layers


def _scale_norm(probe: Probe, factor: Tensor, item: MeanStatistics) -> None:
    """Divide the norm's weight by the factors and give its bias the mean that it will take."""
    module = probe.module
    means = item.mean.reshape(-1).to(factor) * factor
    taken = means.reshape(item.groups, -1).mean(1, keepdim=True).expand(item.groups, -1)
    size = len(factor) // item.groups
    probe.scale = probe.scale / factor
    bias = probe.bias + probe.scale * taken.expand(item.groups, size).reshape(-1)
    _set(module, "weight", probe.scale * probe.gain)
    _set(module, "bias", bias)


def _set(module: nn.Module, key: str, value: Tensor) -> None:
    old = getattr(module, key)
    like = old if old is not None else module.weight
    assert isinstance(like, nn.Parameter)
    requires_grad = like.requires_grad
    module.register_parameter(key, nn.Parameter(value.to(like), requires_grad=requires_grad))


def _note(probe: Probe, plan: Absorption | None) -> str:
    if probe.groups == len(probe.scale):
        return "the mean of each channel is lost: one channel a group"
    if plan is None and probe.prefix is None:
        return "only β fitted: no layer can take up factors"
    return "factors and β fitted"
