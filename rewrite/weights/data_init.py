"""Data-dependent initialization of a weight norm: magnitudes and biases from one batch.

    t = v . x / ||v||  ->  g = 1 / std[t],  b = -mean[t] / std[t]

over batch and space, one layer after the other (Salimans & Kingma 2016, equations 5 and 6). For a
layer that already has some g and b the same is  g <- g / std,  b <- (b - mean) / std.  A unit that
is constant over the batch keeps its g and b, and is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewrite.graph.editable import Editable
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.nn.mean_only import MeanOnlyBatchNorm
from rewrite.outcomes import Change, Site
from rewrite.runtime.layerwise import fit_in_lockstep
from rewrite.weights.fans import layer_kind
from rewrite.weights.unit_statistics import unit_statistics
from rewrite.weights.units import unit_axis

# Layers whose output is one pre-activation that a hook can see, with one bias a unit.
FITTED = ("linear", "conv", "conv_transpose", "bilinear")


@dataclass
class Draft:
    """A change while further steps still add to it."""

    change: Change
    notes: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    keys: dict[str, str | None] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    centred: MeanOnlyBatchNorm | None = None

    def finished(self) -> Change:
        """Return the change with everything that was added."""
        old = self.change
        return Change(
            old.target,
            old.before,
            old.after,
            "; ".join([*filter(None, [old.note]), *self.notes]),
            (*old.touched, *self.touched),
            old.keys if self.keys is None else self.keys,
            self.metrics,
            # What is fitted to data, or stands behind the layer, is no part of the recipe.
            {} if self.metrics or self.keys is not None else old.recipe,
        )


def fit_magnitudes(
    captured: Editable, sites: Sequence[Site], drafts: dict[str, Draft], batch: Any
) -> None:
    """Set g and b of every site in one forward."""
    layers: dict[str, nn.Module] = {}
    for site in sites:
        kind = layer_kind(site.plan.module)
        if kind not in FITTED:
            drafts[site.target].notes.append(f"not fitted: {kind} has no single pre-activation")
        elif any(site.plan.ties.values()):
            drafts[site.target].notes.append("not fitted: its weight is tied")
        else:
            layers[site.target] = site.plan.module

    def fit(name: str, layer: nn.Module, output: torch.Tensor, again: Any) -> torch.Tensor:
        return _standardize(captured.editor, name, layer, output, drafts[name])

    for name in fit_in_lockstep(captured.model, batch, layers, fit):
        drafts[name].notes.append("not fitted: the batch did not reach it")


def _standardize(
    writer: TensorWriter, name: str, layer: nn.Module, output: torch.Tensor, draft: Draft
) -> torch.Tensor:
    units = unit_statistics(layer, output)
    if units.warning is not None:
        warnings.warn(f"{name}: {units.warning}", stacklevel=2)
        draft.notes.append(units.warning)
    if units.samples < 2 or not bool(units.usable.any()):
        return output
    scale = torch.where(units.usable, 1 / units.std, 1.0)
    shift = torch.where(units.usable, -units.mean / units.std, 0.0)
    draft.metrics |= {
        "std before": float(units.std.mean()),
        "mean before": float(units.mean.abs().mean()),
    }
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    g = chain.original0
    flat = g.detach().flatten().to(scale.dtype) * scale
    writer.write(chain, "original0", flat.to(g.dtype).reshape(g.shape))
    axis = unit_axis(layer, output)
    scaled = output * units.along(axis, output, scale)
    if draft.centred is not None:
        norm = draft.centred
        mean = torch.where(units.usable, units.mean / units.std, norm.running_mean)
        writer.write(norm, "running_mean", mean.to(norm.running_mean))
        bias = torch.where(units.usable, 0.0, norm.bias.detach())
        writer.write(norm, "bias", bias.to(norm.bias.dtype))
        return scaled
    old = layer.bias
    if old is None:
        draft.notes.append("a bias was added")
    bias = shift if old is None else old.detach().to(scale.dtype) * scale + shift  # type: ignore[operator]  # the bias of a layer: a Tensor
    writer.write(layer, "bias", bias.to(g.dtype), g.requires_grad)
    return scaled + units.along(axis, output, shift)
