"""What the fit of one norm sums over the data, and the covariance of channel means that it uses.

A hundred samples span few directions of the channel means z̄; the weights know how all others would
come out. The covariance is therefore mixed,

    (1 − r) S + r P,   S over the samples

    behind a dense layer       P = W D Wᵀ         D the variances of the layer's input means
    behind a depthwise one     P = d P' d + R     P' that of the norm in front of it

where z̄_c ≈ d_c z̄'_c, since channel c of a depthwise layer reads channel c alone: d and the
variances R that are left follow from three sums a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.affine.channel_map import Direction
from rewrite.affine.plan import Absorption
from rewrite.affine.planner import MapRequest, Planner
from rewrite.calibration.augment import variations
from rewrite.calibration.batches import Batches
from rewrite.distributed import all_reduce
from rewrite.errors import OptionError
from rewrite.graph.captured import Captured
from rewrite.graph.operators import activation_of, conv_of, norm_of
from rewrite.grouping.activation_slope import activation_slope
from rewrite.grouping.mean_removal import SHRINKAGE
from rewrite.grouping.statistics import MeanStatistics
from rewrite.grouping.swapped_norm import SwappedNorm
from rewrite.runtime.hooks import hooked, run

THROUGH_WEIGHTS = 0.7
"""Part of a covariance that comes from the weights."""


WIDEST = 2048
"""Channels up to which a covariance over all of them is summed up: 32 MiB."""


@dataclass(eq=False)
class NormFit:
    """One norm on its way to its factors.

    Attributes:
        plan: the layers that can absorb factors, if there are any.
        signed: whether factors may be negative.
        kernel: weight of the one dense layer that produces the norm's input, summed over its taps.
        reads: the module of that layer.
        plain: sums over the calibration data, channel by channel.
        varied: sums over it and over variations of it, within the groups or over all channels.
        inputs: sums over what that layer reads, per channel.
        source: the norm in front of the depthwise layer that produces the norm's input.
        shared: sums of the products of its means and this norm's, per channel.
        latest: the means of the last batch.
        slope: how much of an error at each channel of its output an activation passes on.
        mixed: whether the basis of its stream was chosen for it, so that no factors are needed.
    """

    probe: SwappedNorm
    plan: Absorption | None
    signed: bool
    kernel: Tensor | None
    reads: nn.Module | None
    plain: MeanStatistics
    varied: MeanStatistics
    inputs: MeanStatistics | None
    shared: Tensor
    slope: Tensor
    source: NormFit | None = None
    latest: Tensor | None = None
    mixed: bool = False

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.probe.scale)

    @property
    def weight(self) -> Tensor:
        """What an error of each channel of z counts, up to its sign: γ, where it is passed on."""
        return self.probe.scale.cpu() * self.slope

    @property
    def sized(self) -> bool:
        """Whether something can absorb factors."""
        return self.plan is not None or self.probe.prefix is not None

    @property
    def shrinkage(self) -> float:
        """Part of the covariance that is replaced by its diagonal."""
        return SHRINKAGE if self.kernel is None else SHRINKAGE / 3

    def covariance(self, through: float = THROUGH_WEIGHTS) -> Tensor:
        """Return the covariance, (groups, n, n) with the groups of `varied`.

        Args:
            through: part of it that comes from the weights, where they speak for any.
        """
        own, prior = self.varied.covariance, self.prior()
        return own if prior is None else (1 - through) * own + through * prior

    def shrunk(self, through: float = THROUGH_WEIGHTS) -> Tensor:
        """Return the covariance, (groups, n, n), a part of it its diagonal."""
        covariance, part = self.covariance(through), self.shrinkage
        diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
        return (1 - part) * covariance + part * diagonal

    def prior(self) -> Tensor | None:
        """Return the covariance that the weights speak for, or None where they do not."""
        if self.kernel is not None and self.inputs is not None:
            size = self.channels // self.varied.groups
            rows = self.kernel.reshape(-1, size, self.kernel.shape[1])
            variance = self.inputs.covariance.flatten()
            return torch.einsum("gik,k,gjk->gij", rows, variance, rows)
        return None if self.source is None else self._through_channels(self.source)

    def slopes(self) -> Tensor | None:
        """Return d of the depthwise layer in front, (groups, n), or None if there is none."""
        own, other = self.varied, None if self.source is None else self.source.varied
        if other is None or own.groups != other.groups or own.count != other.count:
            return None
        shared = self.shared.reshape(own.groups, -1) / own.count.clamp(min=1)
        shared = shared - own.mean * other.mean
        before = torch.einsum("gii->gi", other.covariance)
        return torch.where(before > 1e-12, shared / before.clamp(min=1e-12), 0.0)

    def _through_channels(self, source: NormFit) -> Tensor | None:
        inner, slopes = source.prior(), self.slopes()
        if inner is None or slopes is None:
            return None
        before = torch.einsum("gii->gi", source.varied.covariance)
        left = torch.einsum("gii->gi", self.varied.covariance) - slopes**2 * before
        return slopes[:, :, None] * inner * slopes[:, None, :] + torch.diag_embed(left.clamp(min=0))

    def reorder(self, order: Tensor) -> None:
        """Follow the channels into another order; `varied` is over all, and then within groups."""
        probe = self.probe
        moved = order.to(probe.scale.device)
        probe.scale, probe.bias = probe.scale[moved], probe.bias[moved]
        self.kernel = None if self.kernel is None else self.kernel[order]
        self.shared = self.shared[order]
        self.slope = self.slope[order]
        self.plain = self.plain.grouped(order, self.channels)
        self.varied = self.varied.grouped(order, probe.groups)

    def mix(self, matrix: Tensor, scale: Tensor, bias: Tensor) -> None:
        """Follow the norm's input z to `matrix` z, with the scale and bias that it needs there."""
        probe = self.probe
        probe.scale, probe.bias = scale.to(probe.scale), bias.to(probe.bias)
        self.plain = self.plain.mapped(matrix)
        self.mixed = True


def fits_of(captured: Captured, planner: Planner, probes: Sequence[SwappedNorm]) -> list[NormFit]:
    """Return what to sum up for each of the norms."""
    fits = [_fit_of(captured, planner, probe) for probe in probes]
    by_module = {id(fit.probe.module): fit for fit in fits}
    for fit in fits:
        fit.source = by_module.get(id(_in_front_of_depthwise(captured, fit.probe)))
    return fits


def _fit_of(captured: Captured, planner: Planner, probe: SwappedNorm) -> NormFit:
    plan, signed = _plan(captured, planner, probe)
    kernel, reads = _kernel(captured, plan)
    channels, groups = len(probe.scale), probe.groups
    wide = None if kernel is None else MeanStatistics.zeros(kernel.shape[1], kernel.shape[1])
    return NormFit(
        probe, plan, signed, kernel, reads,
        MeanStatistics.zeros(channels, channels), MeanStatistics.zeros(channels, groups), wide,
        torch.zeros(channels, dtype=torch.float64), _slope_of(captured, probe),
    )  # fmt: skip


def _slope_of(captured: Captured, probe: SwappedNorm) -> Tensor:
    _, inputs = calls_of(captured, probe)
    if len(inputs) != 1:
        return torch.ones(len(probe.scale), dtype=torch.float64)
    return activation_slope(captured, next(iter(inputs)), probe.scale, probe.bias)


def _plan(
    captured: Captured, planner: Planner, probe: SwappedNorm
) -> tuple[Absorption | None, bool]:
    """Return who absorbs factors of the norm's input, and whether they may be negative."""
    if probe.prefix is not None or probe.groups == len(probe.scale):
        return None, True
    name = captured.tree.name(probe.module)
    if captured.unknown_caller(name) is not None:
        return None, True
    axis, inputs = calls_of(captured, probe)
    if not inputs:
        return None, True
    for positive in (False, True):
        plan = planner.plan(
            MapRequest(
                Direction.BACKWARD,
                inputs,
                axis,
                len(probe.scale),
                shift=False,
                positive=positive,
            )
        )
        if isinstance(plan, Absorption):
            return plan, not positive
    return None, True


def calls_of(captured: Captured, probe: SwappedNorm) -> tuple[int, dict[Node, Node]]:
    """Return the axis of the channels and the input of each call of a norm."""
    name = captured.tree.name(probe.module)
    calls = captured.calls(name)
    if calls:
        return probe.axis, {node: node.all_input_nodes[0] for node in calls}
    # A norm with a forward of its own is looked into: its calls are those of the line within.
    within = [node for node in captured.nodes() if captured.owner(node) == name]
    norms = [norm for node in within if (norm := norm_of(captured, node)) is not None]
    return (norms[0].channel_axis if norms else probe.axis), {n.node: n.input for n in norms}


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
    return over_channels(captured.tensor(layer.weight)), captured.module(layer.module)


def over_channels(weight: Tensor) -> Tensor:
    """Return what a dense layer's weight makes of values that are the same at all positions.

    The taps of a kernel are summed: two axes are left, in their order, float64 on the CPU.
    """
    exact = weight.detach().double().cpu()
    return exact.flatten(2).sum(2) if exact.dim() > 2 else exact


def _in_front_of_depthwise(captured: Captured, probe: SwappedNorm) -> nn.Module | None:
    """Return the norm that a depthwise layer in front of this one reads, through activations."""
    _, inputs = calls_of(captured, probe)
    if len(inputs) != 1:
        return None
    conv = conv_of(captured, next(iter(inputs.values())))
    if conv is None or conv.transposed:
        return None
    if not conv.groups == captured.tensor(conv.weight).shape[0] == len(probe.scale):
        return None
    value = conv.input
    while (activation := activation_of(captured, value)) is not None:
        value = activation.input
    norm = norm_of(captured, value)
    return None if norm is None or norm.module is None else captured.module(norm.module)


def collect(model: nn.Module, fits: Sequence[NormFit], batches: Batches) -> None:
    """Sum up the original model's channel means at each norm, in one pass over the data."""
    plain = True

    def at_norm(index: int, z: Tensor, output: Tensor) -> Tensor:
        fit = fits[index]
        means = fit.probe.means(z)
        fit.varied.add(means)
        if plain:
            fit.plain.add(means)
        fit.latest = means.detach().double().cpu()
        source = None if fit.source is None else fit.source.latest
        if source is not None and source.shape == fit.latest.shape:
            product = source * fit.latest
            fit.shared += product[torch.isfinite(product).all(1)].sum(0)
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
        fit.latest = None
        all_reduce(fit.shared)
        for item in (fit.plain, fit.varied, fit.inputs):
            if item is not None:
                item.reduce()
