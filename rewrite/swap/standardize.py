"""Running statistics moved out of a BatchNorm, into what produces its input.

    y = γ z + β,  z = (x − μ) / σ,  σ = √(var + ε)

    where layers can absorb the map (W/σ, (b − μ)/σ), x itself becomes z; nothing is added
    elsewhere a per-channel affine map (1/σ, −μ/σ), trainable, stands in front of the new norm

Both are exact in eval mode. How a map moves through the graph is `rewrite.affine`'s; here is only
which map, and one ledger for all norms of a model, so that each weight is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from rewrite.affine.algebra import Affine
from rewrite.affine.ledger import Ledger
from rewrite.affine.plan import Absorption, write_tensor
from rewrite.affine.planner import Planner, plan_backward
from rewrite.fold.swap_recipe import bounded
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import Norm
from rewrite.outcomes import Declined


@dataclass(frozen=True)
class Standardized:
    """Where the statistics of one norm went.

    Attributes:
        layers: the layers that absorbed them.
        absorption: what each of them absorbed.
        prefix: the map that has to stand in front of the norm, where none did.
        reason: why none did.
        known: whether there were statistics at all.
    """

    layers: tuple[str, ...] = ()
    absorption: Absorption | None = None
    prefix: Affine | None = None
    reason: str = ""
    known: bool = True


def standardize(captured: Editable, norms: Iterable[Norm]) -> dict[Node, Standardized]:
    """Give the producers of each norm its statistics; return where they went, by the norm's node.

    The norms themselves are not touched: what replaces them has to be a norm without statistics.
    """
    planner = Planner(captured)
    ledger = Ledger(captured.tensor, keeps_zero_bias=True)
    outcomes: dict[Node, Standardized] = {}
    for norm in norms:
        outcomes[norm.node] = _standardize(captured, norm, planner, ledger)
    ledger.write(lambda layer, attr, new: write_tensor(captured.editor, layer, attr, new))
    return outcomes


def _standardize(captured: Captured, norm: Norm, planner: Planner, ledger: Ledger) -> Standardized:
    if norm.running_mean is None or norm.running_var is None:
        return Standardized(known=False, reason="it has no running statistics to keep")
    mean, var = captured.tensor(norm.running_mean), captured.tensor(norm.running_var)
    affine = bounded(Affine.batch_norm(mean, var, None, None, norm.eps))
    plan = plan_backward(captured, norm.node, positive=True, planner=planner)
    if isinstance(plan, Declined):
        return Standardized(prefix=affine, reason=plan.reason)
    if reason := _overflow(captured, plan, affine):
        return Standardized(prefix=affine, reason=reason)
    plan.enter(ledger, affine)
    return Standardized(plan.layers, plan)


def _overflow(captured: Captured, plan: Absorption, affine: Affine) -> str:
    """Return why a half-precision weight could not hold the scaled values, or ""."""
    if affine.scale.is_meta:
        return ""
    largest = float(affine.scale.abs().max()) if affine.scale.numel() else 0.0
    shift = float(affine.shift.abs().max()) if affine.shift.numel() else 0.0
    for edit in plan.edits:
        if edit.layer.weight is None:
            continue
        weight = captured.tensor(edit.layer.weight)
        if weight.is_meta:
            continue
        limit = torch.finfo(weight.dtype).max
        if float(weight.detach().abs().max()) * largest > limit or shift > limit:
            return f"the scaled weight of {edit.layer.name} would overflow {weight.dtype}"
    return ""
