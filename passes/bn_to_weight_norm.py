"""BatchNorm to weight normalization, with the same eval function.

    eval:  bn(W x + b) = W' x + b',   W' = (gamma / sigma) W,   b' = (gamma / sigma)(b - mu) + beta
    then   W' = g v / ||v||

The norm is folded exactly and the layers that absorbed it are reparameterized: no batch statistics
are left, which is what recurrent, generative and reinforcement-learning users want (Salimans &
Kingma 2016). With `mean_only` the mean stays a statistic of the batch (section 4 of the paper):

    train:  W' x - mean_batch[W' x] + beta          eval:  W' x - (beta - b') + beta = W' x + b'
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from passes.fold import FoldNorm
from rewrite.errors import OptionError
from rewrite.fold.folder import Fold
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.operators import norm_of
from rewrite.nn.mean_only import MeanOnlyBatchNorm
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.fans import linear_maps
from rewrite.weights.weight_norm import add_weight_norm, weight_layouts, weight_refusal
from rewrite.weights.weight_norm_recipe import NormedWeight


@dataclass(frozen=True)
class BatchNormToWeightNorm(Pass):
    """Replace BatchNorm by weight normalization of the layer that absorbs it.

    Rewrites:
      1. Every BatchNorm that `fold` can fold; each layer that absorbs its map is weight-normed.

    Declines: what `fold` declines, with its reason; norms that no layer with a weight of its own
    would absorb, or whose layer cannot be weight-normed.
    """

    name: ClassVar[str] = "bn-to-weight-norm"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    mean_only: bool = field(
        default=False, metadata={"help": "keep centring each batch, by mean-only batch norm"}
    )
    momentum: float = field(
        default=0.1, metadata={"help": "of the running means of mean_only, 0.1 by default"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise OptionError(f"{self.name}: momentum is {self.momentum}; pass a number in (0, 1]")

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm that can be folded into layers with a weight."""
        for outcome in FoldNorm(merge=False).find(captured):
            if isinstance(outcome, Skip):
                if "BatchNorm" in outcome.before or "batch_norm" in outcome.before:
                    yield outcome
                continue
            norm = norm_of(captured, outcome.node) if outcome.node is not None else None
            fold = _fold_of(outcome)
            if norm is None or norm.kind != "batch" or fold is None:
                continue
            reason = _refusal(captured, fold)
            yield outcome if reason is None else Skip(outcome.target, outcome.before, reason)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Rewrite one site."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Fold every norm, then reparameterize every layer that absorbed one, once."""
        centres = {s.target: _shift(captured, s) for s in sites} if self.mean_only else {}
        changes = FoldNorm(merge=False).rewrite_all(captured, sites)
        finished: list[Change] = []
        normed: set[str] = set()
        for site, change in zip(sites, changes, strict=True):
            plan = _fold_of(site)
            assert plan is not None  # `find` yields no other
            note, touched = "", list(change.touched)
            if self.mean_only:
                note = self._centre(captured, site.target, plan.layers, centres[site.target])
            keys = dict(change.keys)
            for name in plan.layers:
                if name not in normed:
                    normed.add(name)
                    keys |= _normed(captured, name)
            after = f"weight norm of {', '.join(plan.layers)}"
            finished.append(
                replace(change, after=after, note=note, touched=tuple(touched), keys=keys)
            )
        return finished

    def _centre(
        self, captured: Editable, target: str, layers: tuple[str, ...], beta: torch.Tensor | None
    ) -> str:
        """Put a mean-only norm where the norm was, or say why there is none."""
        layer = captured.module(layers[0])
        if beta is None or len(layers) > 1 or not isinstance(captured.module(target), nn.Identity):
            return "no mean-only norm: it was not one module right after one layer"
        bias: torch.Tensor = layer.bias  # type: ignore[assignment]  # absorbing a norm gave it one
        norm = MeanOnlyBatchNorm(beta.numel(), self.momentum).to(bias)
        mean = (beta.double() - bias.detach().double()).to(bias)
        captured.editor.write(norm, "bias", beta.to(bias), bias.requires_grad)
        captured.editor.write(norm, "running_mean", mean)
        captured.editor.write(layer, "bias", None)
        captured.editor.replace(target, norm)
        return "mean-only batch norm in its place"


def _fold_of(site: Site) -> Fold | None:
    """Return what `fold` planned for a site, if that is a fold."""
    planned = getattr(site.plan, "what", site.plan)
    return planned if isinstance(planned, Fold) else None


def _refusal(captured: Captured, fold: Fold) -> str | None:
    if not fold.layers:
        return "no layer absorbs it"
    for name in fold.layers:
        if name not in captured.tree.names:
            return f"{name} is applied by code, not by a layer"
        layer = captured.module(name)
        if [m.parameter for m in linear_maps(layer)] != ["weight"]:
            return f"{name} has no weight of its own to normalize"
        if (reason := weight_refusal(layer, "weight")) is not None:
            return f"weight of {name} {reason}"
        others = [r for r in captured.tied(_weight_ref(captured, name)) if r.owner != name]
        if others:
            return f"weight of {name} is tied to {others[0].name}"
    return None


def _weight_ref(captured: Captured, name: str) -> TensorRef:
    return TensorRef(captured.tree.name(captured.module(name)), "weight")


def _shift(captured: Captured, site: Site) -> torch.Tensor | None:
    """Return beta of a norm right after the layer that absorbs it, None for any other norm."""
    assert site.node is not None
    norm = norm_of(captured, site.node)
    assert norm is not None
    before = norm.input
    fold = _fold_of(site)
    if fold is None or before.op != "call_module" or str(before.target) not in fold.layers:
        return None
    if norm.bias is not None:
        return captured.tensor(norm.bias).detach().clone()
    assert norm.running_mean is not None  # without statistics it would not fold
    return torch.zeros_like(captured.tensor(norm.running_mean))


def _normed(captured: Editable, name: str) -> dict[str, str | None]:
    layer = captured.module(name)
    ((key, layout),) = weight_layouts(layer).items()
    unrounded = (captured.exact or {}).get(f"{name}.{key}")
    add_weight_norm(captured.editor, layer, key, layout)
    stem = f"{name}.parametrizations.{key}.original"
    if unrounded is not None:
        groups = layout.groups if layout.inputs_first else 1
        places = ((f"{name}.{key}", f"{stem}0", f"{stem}1"),)
        weight = NormedWeight(places, groups, layout.inputs_first)
        captured.keep_exact(weight.unrounded(unrounded()))
    return {f"{name}.{key}": f"{stem}1"}
