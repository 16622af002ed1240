"""The map from old state-dict keys to new ones, as data: fold another checkpoint without a model.

Each change of a fold carries a recipe: which tensors make the map y = s.x + t, which layers take up
which part of it, and which keys go. Replaying the recipes on the state dict of the same
architecture gives the state dict of its folded form, by the same arithmetic
(`rewrite.affine.layers`).

What a plan relied on is part of its recipe (no shift, no scale, positive scales): a checkpoint that
breaks it is refused, not folded wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewrite.affine.layers import Layer
from rewrite.affine.plan import Edit
from rewrite.fold.folder import Fold
from rewrite.fold.merged_kernel import Merge, place_of
from rewrite.graph.captured import Captured

Recipe = Mapping[str, Any]


# --- writing recipes -----------------------------------------------------------------------------


def fold_recipe(captured: Captured, fold: Fold) -> dict[str, Any]:
    """Return what it takes to repeat `fold` on another checkpoint."""
    source = fold.source
    if source.layer is not None:
        origin: dict[str, Any] = {"layer": _layer(captured, source.layer)}
    elif source.constants:
        origin = {"constants": [link.recipe for link in source.constants]}
    else:
        origin = {"scale": fold.affine.scale.tolist(), "shift": fold.affine.shift.tolist()}
    return {
        "do": "fold",
        "origin": origin,
        "scales": bool((fold.affine.scale != 1).any()),
        "adds": fold.adds,
        "needs_positive": fold.needs_positive,
        "moves": [
            {"part": move.part, "edits": [_edit(captured, e) for e in move.absorption.edits]}
            for move in fold.moves
        ],
    }


def merge_recipe(captured: Captured, merge: Merge, name: str) -> dict[str, Any]:
    """Return what it takes to repeat `merge`, whose convolution is called `name`."""
    outer = merge.outer
    return {
        "do": "merge",
        "name": name,
        "like": outer.weight.name,
        "groups": outer.groups,
        "terms": [
            {
                "weight": None if term.conv is None else term.conv.weight.name,
                "bias": None
                if term.conv is None
                else f"{term.conv.weight.name.removesuffix('weight')}bias",
                "at": list(place_of(captured, term, outer)),
                "links": list(term.links),
            }
            for term in merge.terms
        ],
    }


def _layer(captured: Captured, layer: Layer) -> dict[str, Any]:
    aliases = [] if layer.module is None else list(captured.aliases(layer.module))
    bias = layer.bias.name if layer.bias is not None else None
    return {
        "name": layer.name,
        "kind": layer.kind,
        "module": layer.module,
        "aliases": aliases,
        "cloned": layer.call is not None,
        "weight": None if layer.weight is None else layer.weight.name,
        "bias": bias,
        "mean": None if layer.mean is None else layer.mean.name,
        "var": None if layer.var is None else layer.var.name,
        "eps": layer.eps,
        "groups": layer.layout.groups,
        "transposed": layer.layout.transposed,
    }


def _edit(captured: Captured, edit: Edit) -> dict[str, Any]:
    plain = torch.equal(edit.index, torch.arange(len(edit.index)))
    return {
        "layer": _layer(captured, edit.layer),
        "side": edit.side,
        "index": len(edit.index) if plain else edit.index.tolist(),
        "scale": edit.scale,
        "shift": edit.shift,
        "inverse": edit.inverse,
    }
