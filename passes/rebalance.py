"""Rescale channels so that what writes them and what reads them are balanced; the function stays.

    relu(d x) = d relu(x) for d > 0:     W₁ → D W₁, b₁ → D b₁,  W₂ → W₂ D⁻¹

`objective` says for what: "l2" makes the sum of squares of all weights as small as it can be
(ENorm, https://arxiv.org/abs/1902.10416), "equalize" gives what writes and what reads a channel one
range, for quantization without data (https://arxiv.org/abs/1906.04721), "path" conditions training
(https://arxiv.org/abs/2602.19799). `rewrite.rescaling.balance` has the equations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from rewrite.errors import CaptureError, CheckpointError, OptionError, PassError
from rewrite.fold.executor import run_recipes
from rewrite.fold.recipes import FoldRecipe
from rewrite.fold.store import ModelStore
from rewrite.graph.capture import in_other_mode
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Declined, Site, Skip
from rewrite.protocol import Pass
from rewrite.rescaling.bias_absorption import bias_absorptions
from rewrite.rescaling.clipped import Clip, clips
from rewrite.rescaling.plan import OBJECTIVES, Rescaling, describe, plan_rescaling
from rewrite.rescaling.scales import Scales
from rewrite.weights.tensor_recipe import Exact

_ONE_BOUND = "one bound for all channels lets no scale pass; clip-channels gives each its own"

BALANCED = 1e-4
"""Largest |log d| of channels that are left alone: float32 rounds a balanced network by less."""


@dataclass(frozen=True)
class Rebalance(Pass):
    """Scale the channels between layers by positive numbers that the network does not notice.

    Rewrites:
      1. Channels between convolutions (grouped, depthwise and transposed ones too), linear layers
         and norms, through ReLU, LeakyReLU, PReLU, pooling and whatever else is positively
         homogeneous; a batch norm carries a scale in its weight and bias.
      2. Residual streams with one scale a channel; branches; concatenations, each part its own.
      3. With `absorb_bias`: biases of batch norms above three deviations go into the next layer;
         the contract is then `approximate`.
      4. Tensors with one number a channel that are added to a value, and bounds of `clip-channels`:
         they are scaled with the channel.
      5. With `clipped=relu`: ReLU6, Hardtanh and clamp from 0 become ReLU first. That is another
         function, and the contract is then `approximate`.

    Declines: channels that reach an input, an output, code that was not traced, an activation that
    is not homogeneous, or a norm that would see another scale; shared weights; weights in half
    precision or with values that are not finite; groups that are balanced already; channels that
    would need a scale beyond 2^19; with `objective=path`, a network that is not homogeneous as a
    whole.
    """

    name: ClassVar[str] = "rebalance"
    contract: ClassVar[Contract] = Contract.EXACT

    objective: str = field(
        default="l2", metadata={"help": "what is balanced: path, l2 (default) or equalize"}
    )
    clipped: str = field(
        default="decline",
        metadata={"help": "ReLU6 and its like: decline (keep them), or relu (another function)"},
    )

    absorb_bias: bool = field(
        default=False,
        metadata={"help": "move high biases of norms into the next layer (an approximation)"},
    )

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise OptionError(
                f"{self.name}: objective is {self.objective!r}; pass one of {', '.join(OBJECTIVES)}"
            )
        if self.clipped not in ("decline", "relu"):
            raise OptionError(f"{self.name}: clipped is {self.clipped!r}; pass decline or relu")
        if self.clipped == "relu" or self.absorb_bias:
            object.__setattr__(self, "contract", Contract.APPROXIMATE)

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every group of channels in data-flow order, and the activations that would go."""
        if empty := next((n for n, p in captured.model.named_parameters() if p.is_meta), None):
            reason = ""
            if captured.numbers is None:
                reason = f"{empty} is on the meta device: scales are chosen by values"
            elif self.objective == "path" or self.absorb_bias:
                reason = "its scales are chosen by what the model computes: convert it in memory"
            if reason:
                yield Skip("", f"{self.objective} objective", reason)
                return
        clipped: list[Clip] = []
        for clip in clips(captured):
            if self.clipped != "relu":
                yield Skip(clip.target, clip.what, _ONE_BOUND)
            elif clip.refusal:
                yield Skip(clip.target, clip.what, clip.refusal)
            else:
                clipped.append(clip)
                yield Site(clip.target, clip.what, clip.nodes[0], clip)
        for absorption in bias_absorptions(captured) if self.absorb_bias else ():
            if isinstance(absorption.found, Declined):
                yield Skip(absorption.target, absorption.before, absorption.found.reason)
            else:
                node = absorption.found.layers()[0].node
                yield Site(absorption.target, absorption.before, node, absorption.found)
        scales = _scales(captured, clipped)
        try:
            plan = plan_rescaling(scales, self.objective)
        except (CaptureError, OptionError) as error:
            yield Skip("", f"{self.objective} objective", str(error))
            return
        for layer, reason in scales.refused():
            yield Skip(layer.name, f"{layer.channels_out} channels", reason)
        for number, group in enumerate(plan.groups):
            if _largest(plan.log_scales[number]) <= BALANCED:
                yield Skip(group.target, describe(group), plan.unmoved(number))
            else:
                yield Site(group.target, describe(group), group.writers[0].layer.node, plan)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Rescale one group, or replace one activation."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Rescale all groups: each layer's new weight is computed once, from both of its sides.

        Raises:
            PassError: a weight that would be written is not finite.
        """
        clipped = [site.plan for site in sites if isinstance(site.plan, Clip)]
        targets = [site.target for site in sites if isinstance(site.plan, Rescaling)]
        plan = self._plan(captured, sites, clipped, targets)
        numbers = {group.target: number for number, group in enumerate(plan.groups)}
        recipes = {target: plan.recipe(numbers[target]) for target in targets if target in numbers}
        absorbed = [site.plan for site in sites if isinstance(site.plan, FoldRecipe)]
        # A shift is taken out of the value as it was, before its channels are scaled.
        every = [*absorbed, *recipes.values()]
        store = ModelStore(captured, every)
        exact: Exact | None = None if captured.exact is None else {}
        try:
            run_recipes(every, store, exact)
        except CheckpointError as error:
            raise PassError(f"{self.name}: {error}") from error
        captured.keep_exact(store.named(exact or {}))
        changes = []
        for site in sites:
            if isinstance(site.plan, Clip):
                site.plan.replace(captured)
                changes.append(_replaced(site))
            elif isinstance(site.plan, FoldRecipe):
                changes.append(_shifted(site, site.plan))
            else:
                recipe = recipes[site.target]
                layers = tuple(dict.fromkeys(layer.name for layer in recipe.layers()))
                changes.append(
                    Change(
                        site.target, site.before, f"scaled for {self.objective}",
                        touched=layers, recipe=recipe.to_data(),
                        metrics=_metrics(plan.log_scales[numbers[site.target]]),
                    )
                )  # fmt: skip
        return changes

    def _plan(
        self, captured: Captured, sites: Sequence[Site], clipped: list[Clip], targets: list[str]
    ) -> Rescaling:
        """Return the plan of `find`, or another where not all of its sites are wanted."""
        plans = [site.plan for site in sites if isinstance(site.plan, Rescaling)]
        if plans:
            moved = [
                group.target
                for group, log_scale in zip(plans[0].groups, plans[0].log_scales, strict=True)
                if _largest(log_scale) > BALANCED
            ]
            every = {node for clip in clips(captured) for node in clip.nodes}
            if set(moved) == set(targets) and (
                self.clipped != "relu" or every == {n for clip in clipped for n in clip.nodes}
            ):
                return plans[0]
        return plan_rescaling(_scales(captured, clipped), self.objective, set(targets))


def _scales(captured: Captured, clipped: Iterable[Clip]) -> Scales:
    nodes = frozenset(node for clip in clipped for node in clip.nodes)
    return Scales(captured, nodes, in_other_mode(captured))


def _largest(log_scales: Tensor) -> float:
    return float(log_scales.abs().max()) if len(log_scales) else 0.0


def _metrics(log_scales: Tensor) -> dict[str, float]:
    scales = log_scales.exp()
    return {"smallest scale": float(scales.min()), "largest scale": float(scales.max())}


def _shifted(site: Site, recipe: FoldRecipe) -> Change:
    layers = tuple(dict.fromkeys(layer.name for layer in recipe.layers()))
    return Change(
        site.target, site.before, f"absorbed by {', '.join(layers[1:])}",
        "an approximation", touched=layers, recipe=recipe.to_data(),
    )  # fmt: skip


def _replaced(site: Site) -> Change:
    return Change(
        site.target, site.before, "ReLU", "another function above the bound",
        touched=(site.target,), recipe={"do": "with", "target": site.target},
    )  # fmt: skip
