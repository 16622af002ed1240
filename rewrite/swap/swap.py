"""What of a trained model a norm swap keeps, and how: the part that the three swaps share.

    nothing      y = n(x)                        a fresh norm: γ = 1, β = 0
    affine       y = γ n(x) + β                  γ and β copied
    statistics   y = γ g n_B((x − μ)/σ) + β      running statistics moved to the producers, anchored
    function     the same, and what n still takes away made as constant as data can tell

n is the new norm without affine, n_B the same with eps = B² and g = √(1 + B²)
(`rewrite.swap.anchor`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from rewrite.affine.tensor_readers import TensorReaders
from rewrite.errors import OptionError
from rewrite.fold.requirements import broken_statistics
from rewrite.fold.swap_recipe import swap_data, with_norm
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.operators import Norm, norm_of
from rewrite.grouping.swapped_norm import SwappedNorm
from rewrite.nn.modules import ChannelAffine
from rewrite.outcomes import Change, Site, Skip
from rewrite.swap import batch_norms as swap
from rewrite.swap.anchor import gain, largest_anchor
from rewrite.swap.keep_function import SwapOptions, keep_function
from rewrite.swap.standardize import Standardized, standardize

Keep = Literal["function", "statistics", "affine", "nothing"]


KEEP_HELP = "what of the model to keep: function (needs data), statistics, affine or nothing"


ANCHOR_HELP = "0: the new norm's own statistics; larger: nearer to the old function (1 or 30)"


DEFAULT_ANCHOR = {"statistics": 1.0, "function": 30.0}
"""Without data the group's mean is what hurts, and a larger anchor lets more of it through."""


Make = Callable[[Any, Norm], nn.Module]


def check(name: str, keep: str, anchor: float | None) -> None:
    """Raise OptionError if the options do not fit."""
    if keep not in get_args(Keep):
        raise OptionError(f"{name}: keep is {keep!r}; pass one of {', '.join(get_args(Keep))}")
    if anchor is not None and keep not in DEFAULT_ANCHOR:
        raise OptionError(f"{name}: anchor goes with keep=statistics or keep=function, not {keep}")
    if anchor is not None and not 0 <= anchor < float("inf"):
        raise OptionError(f"{name}: anchor is {anchor}; pass 0 or more")


def sites(
    captured: Captured, keep: str, decide: Callable[[swap.Candidate], object]
) -> Iterator[Site | Skip]:
    """Yield the sites of a swap, and skips.

    Where γ and β change, norms are declined whose statistics are no map to keep, or whose γ or β
    other code reads.
    """
    if keep not in DEFAULT_ANCHOR:
        return swap.sites(captured, decide)
    readers = TensorReaders(captured)

    def decided(candidate: swap.Candidate) -> object:
        norm = candidate.norm
        reason = _no_map(captured, norm) or swap.reader_of(captured, readers, norm)
        return reason or decide(candidate)

    return swap.sites(captured, decided)


def _no_map(captured: Captured, norm: Norm) -> str:
    """Return which running statistic of a norm makes it no function, or ""."""
    if norm.running_mean is None or norm.running_var is None:
        return ""
    mean, var = norm.running_mean, norm.running_var
    read = captured.tensor
    return broken_statistics((mean.name, read(mean)), (var.name, read(var)), norm.eps)


@dataclass(frozen=True)
class Swapped:
    """One norm that was replaced: its change so far, and the new norm as the fit sees it."""

    change: Change
    probe: SwappedNorm


def swap_all(
    captured: Editable,
    sites: Sequence[Site],
    settings: SwapOptions,
    make: Make,
    calibration: Iterable[Any] | None,
) -> list[Change]:
    """Replace the norms of all sites, keeping what `settings` say.

    Raises:
        OptionError: keep=function without data, or with data that cannot be used.
    """
    if settings.keep == "function" and calibration is None:
        raise OptionError(
            "keep=function fits to data; pass calibration (--calibration DATA), or keep=statistics"
        )
    norms = [_norm(captured, site) for site in sites]
    moved: dict[Any, Standardized] = {}
    if settings.keep in DEFAULT_ANCHOR:
        moved = standardize(captured, norms)
    recipes = [_recipe(captured, norm, moved.get(norm.node), settings) for norm in norms]
    norms = [_norm(captured, site) for site in sites]
    swapped = [
        _swap(captured, site, norm, make(site.plan, norm), settings, moved.get(norm.node), recipe)
        for site, norm, recipe in zip(sites, norms, recipes, strict=True)
    ]
    changes = [item.change for item in swapped]
    if settings.keep != "function":
        return changes
    assert calibration is not None
    captured.editor.commit()
    probes = [item.probe for item in swapped]
    kept, agreement = keep_function(captured.model, probes, calibration, settings.mix)
    captured.notes.extend(agreement.sentences())
    return [
        replace(
            change,
            note="; ".join(filter(None, (change.note, more.note))),
            touched=(*change.touched, *more.touched),
            metrics=more.metrics,
        )
        for change, more in zip(changes, kept, strict=True)
    ]


def _norm(captured: Captured, site: Site) -> Norm:
    assert site.node is not None
    norm = norm_of(captured, site.node)
    assert norm is not None
    return norm


def _recipe(
    captured: Editable, norm: Norm, moved: Standardized | None, settings: SwapOptions
) -> dict[str, Any]:
    """Return what repeats a swap on another checkpoint; nothing of what is fitted to data."""
    if settings.keep == "function":
        return {}
    absorption = None if moved is None else moved.absorption
    prefix = moved is not None and moved.known and moved.prefix is not None
    return swap_data(captured, norm, absorption, prefix=prefix)


def _swap(
    captured: Editable,
    site: Site,
    norm: Norm,
    module: nn.Module,
    settings: SwapOptions,
    moved: Standardized | None,
    recipe: dict[str, Any],
) -> Swapped:
    swap.copy_affine(captured, norm, module)
    if settings.keep == "nothing":
        _reset(captured, module)
    notes = [getattr(site.plan, "note", ""), swap.affine_note(norm)]
    gamma, beta, like = _affine(captured, module, norm)
    anchored = 1.0
    placed = module
    if moved is not None and moved.known:
        anchor = settings.anchor if settings.anchor is not None else DEFAULT_ANCHOR[settings.keep]
        anchored, note = _anchor(captured, module, gamma, like, anchor)
        notes.append(note)
        if moved.prefix is not None:
            placed = _behind_prefix(moved, module, like)
            notes.append(f"statistics in a channel affine in front: {moved.reason}")
        else:
            notes.append(f"statistics in {', '.join(moved.layers)}")
    elif moved is not None:
        notes.append(moved.reason)
    name, kept = swap.install(captured, norm, placed)
    notes.append(kept)
    layers = moved.layers if moved is not None else ()
    change = Change(
        site.target, site.before, swap.describe_norm(module), "; ".join(filter(None, notes)),
        (site.target, name, *layers),
        recipe=with_norm(recipe, name, anchored, reset=settings.keep == "nothing"),
    )  # fmt: skip
    prefix = placed[0] if isinstance(placed, nn.Sequential) else None
    fits = moved is not None and moved.known
    return Swapped(change, SwappedNorm(site.target, module, gamma, beta, anchored, prefix, fits))


def _affine(
    captured: Captured, module: nn.Module, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return γ and β of a new norm in float64, filled in, and a tensor of its dtype."""
    assert norm.num_features is not None
    ref = norm.weight or norm.bias or norm.running_mean
    like = torch.zeros(()) if ref is None else captured.tensor(ref).detach()
    ones = torch.ones(norm.num_features, dtype=torch.float64, device=like.device)
    weight, bias = module.weight, module.bias
    gamma = weight.detach().double() if isinstance(weight, torch.Tensor) else ones
    beta = bias.detach().double() if isinstance(bias, torch.Tensor) else torch.zeros_like(ones)
    return gamma, beta, like


def _anchor(
    captured: Editable, module: nn.Module, gamma: torch.Tensor, like: torch.Tensor, anchor: float
) -> tuple[float, str]:
    """Anchor a new norm; return what its weight was multiplied by, and what to say."""
    if anchor == 0:
        return 1.0, ""
    trainable = isinstance(module.weight, nn.Parameter) and module.weight.requires_grad
    chosen = largest_anchor(gamma.to(like), anchor)
    note = f"anchor {chosen:.3g}"
    if chosen < anchor:
        note += f" instead of {anchor:.3g}, the largest that {like.dtype} holds"
    if module.weight is None:
        note += ", γ filled in"
    captured.editor.write(module, "weight", (gamma * gain(chosen)).to(like), trainable)
    module.eps = float(module.eps) + chosen * chosen  # type: ignore[arg-type, assignment]  # the float of a norm, for nn.Module a Tensor or a Module
    return gain(chosen), note


def _behind_prefix(moved: Standardized, module: nn.Module, like: torch.Tensor) -> nn.Sequential:
    assert moved.prefix is not None
    scale, shift = moved.prefix.scale.to(like), moved.prefix.shift.to(like)
    return nn.Sequential(OrderedDict(affine=ChannelAffine(scale, shift), norm=module))


def _reset(captured: Editable, module: nn.Module) -> None:
    for key, value in (("weight", 1.0), ("bias", 0.0)):
        old = getattr(module, key)
        if isinstance(old, nn.Parameter):
            captured.editor.write(module, key, torch.full_like(old, value), old.requires_grad)
