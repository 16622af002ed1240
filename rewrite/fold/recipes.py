"""What a fold does, as data: planned on one model, run on it, and on other checkpoints of its kind.

    fold       a map y = s.x + t, made of tensors, and the layers that absorb which part of it
    affine     a norm that becomes one multiply-add, with all that it has absorbed
    merge      parallel branches that become one convolution
    observed   a norm's affine part, and the tensors that read it in observed calls
    stream     a residual stream in another basis, and the tensors that write to it and read it
    tensors    weight norms put on or taken off, weights drawn anew, new tensors of one number

A recipe names tensors as a state dict does. `rewrite.fold.executor` runs it; what a report holds of
it is JSON, which version 0.1 can read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Node

from rewrite.affine.algebra import Affine, KernelLayout
from rewrite.affine.layers import Layer, Side
from rewrite.affine.plan import Absorption, Edit
from rewrite.errors import CheckpointError
from rewrite.fold.folder import Fold, Move
from rewrite.fold.links import Link, constant_link
from rewrite.fold.requirements import Requirements
from rewrite.graph.captured import Captured, TensorRef
from rewrite.init.draw_recipe import DRAWN, DrawnTensors
from rewrite.observe.recipe import KIND, ReaderRecipe
from rewrite.observe.stream_recipe import KIND as STREAM
from rewrite.observe.stream_recipe import StreamRecipe
from rewrite.weights.constant_recipe import KIND as CONSTANT
from rewrite.weights.constant_recipe import ConstantRecipe
from rewrite.weights.tensor_recipe import TensorRecipe
from rewrite.weights.weight_norm_recipe import (
    ADDED,
    REMOVED,
    AddedWeightNorm,
    RemovedWeightNorm,
)

Data = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class FoldRecipe:
    """A map, and where it goes.

    Attributes:
        target: the name to report.
        origin: what the map is made of: a norm, a chain of links, or the map itself.
        requirements: what the plan relies on of its numbers.
        moves: which layers absorb which part.
        aliases: other names of those layers' modules, by the name of the layer.
        neutral: what becomes of the tensors of a norm that has to keep them: all ones, all zeros.
        gone: the tensors that go, where a store is to be told so.
        planned: the map as the plan computed it, where the recipe runs on the model that it was
            planned on; without one it is made of the tensors.
    """

    target: str
    origin: Layer | tuple[Link, ...] | Affine
    requirements: Requirements
    moves: tuple[Move, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    neutral: Mapping[str, float] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    planned: Affine | None = None

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers that absorb something."""
        return tuple(edit.layer for move in self.moves for edit in move.absorption.edits)

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        neutral = {"neutral": dict(self.neutral)} if self.neutral else {}
        return {
            "do": "fold",
            **neutral,
            "origin": self._origin_data(),
            "scales": self.requirements.scales,
            "adds": self.requirements.adds,
            "needs_positive": self.requirements.positive,
            "invertible": self.requirements.invertible,
            "moves": [
                {
                    "part": move.part,
                    "edits": [edit_data(e, self.aliases) for e in move.absorption.edits],
                }
                for move in self.moves
            ],
        }

    def _origin_data(self) -> dict[str, Any]:
        if isinstance(self.origin, Layer):
            return {"layer": _layer_data(self.origin, self.aliases)}
        if isinstance(self.origin, Affine):
            return {"scale": self.origin.scale.tolist(), "shift": self.origin.shift.tolist()}
        return {"constants": [dict(link.data) for link in self.origin]}


@dataclass(frozen=True, eq=False)
class AffineRecipe:
    """A norm that becomes the multiply-add called `name`."""

    target: str
    layer: Layer
    name: str

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        return {"do": "affine", "layer": _layer_data(self.layer, {}), "name": self.name}


@dataclass(frozen=True, eq=False)
class TermRecipe:
    """One branch: a convolution or nothing, where its first tap goes, and what stands behind it.

    Version 0.1 named a bias whether there was one or not: it `may_lack_bias`.
    """

    weight: str | None
    bias: str | None
    at: tuple[int, ...]
    links: tuple[Link, ...]
    may_lack_bias: bool = False

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        links = [dict(link.data) for link in self.links]
        return {"weight": self.weight, "bias": self.bias, "at": list(self.at), "links": links}


@dataclass(frozen=True, eq=False)
class MergeRecipe:
    """Branches that become the convolution called `name`, of the shape of the weight `like`."""

    target: str
    name: str
    like: str
    groups: int
    terms: tuple[TermRecipe, ...]

    def reads(self) -> set[str]:
        """Return the names of the tensors that the branches are made of."""
        names = {name for term in self.terms for name in (term.weight, term.bias) if name}
        return names.union(*(link.reads() for term in self.terms for link in term.links))

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        return {
            "do": "merge",
            "name": self.name,
            "like": self.like,
            "groups": self.groups,
            "version": 2,
            "terms": [term.to_data() for term in self.terms],
        }


Recipe = FoldRecipe | AffineRecipe | MergeRecipe | ReaderRecipe | StreamRecipe | TensorRecipe

_TENSOR_RECIPES: Mapping[str, Callable[[Data], TensorRecipe]] = {
    ADDED: AddedWeightNorm.from_data,
    REMOVED: RemovedWeightNorm.from_data,
    DRAWN: DrawnTensors.from_data,
    CONSTANT: ConstantRecipe.from_data,
}
"""The recipes of single tensors, by what a report calls them."""


def recipe_of(captured: Captured, fold: Fold) -> FoldRecipe:
    """Return what a planned fold does."""
    source = fold.source
    if source.layer is not None:
        origin: Layer | tuple[Link, ...] | Affine = source.layer
    elif source.constants:
        origin = tuple(constant_link(captured, constant) for constant in source.constants)
    else:
        origin = fold.affine
    layers = [e.layer for move in fold.moves for e in move.absorption.edits]
    if source.layer is not None:
        layers.append(source.layer)
    modules = {layer.name: layer.module for layer in layers if layer.module is not None}
    aliases = {name: captured.aliases(module) for name, module in modules.items()}
    neutral = _neutral(captured, source.layer) if fold.keeps and source.layer else {}
    return FoldRecipe(
        source.target, origin, fold.requirements, fold.moves, aliases, neutral, planned=fold.affine
    )


def _neutral(captured: Captured, norm: Layer) -> dict[str, float]:
    """Return weight and bias with which a norm scales nothing, under every name."""
    return {
        TensorRef(place, ref.attr).name: value
        for ref, value in ((norm.weight, 1.0), (norm.bias, 0.0))
        if ref is not None
        for place in (ref.owner, *captured.aliases(ref.owner))
    }


def edit_data(edit: Edit, aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return what one layer absorbs, as JSON's own types."""
    return {
        "layer": _layer_data(edit.layer, aliases),
        "side": edit.side.value,
        "index": len(edit.index) if edit.whole else edit.index.tolist(),
        "scale": edit.scale,
        "shift": edit.shift,
        "inverse": edit.inverse,
    }


# --- JSON ----------------------------------------------------------------------------------------


def from_data(data: Data) -> Recipe:
    """Return the recipe that a report holds.

    Raises:
        CheckpointError: it is none, or one that only the model itself can repeat.
    """
    try:
        if data["do"] == "fold":
            return _fold_from(data)
        if data["do"] == "affine":
            layer = _layer_from(data["layer"])
            return AffineRecipe(layer.name, layer, data["name"])
        if data["do"] == "merge":
            return _merge_from(data)
        if data["do"] == KIND:
            return ReaderRecipe.from_data(data)
        if data["do"] == STREAM:
            return StreamRecipe.from_data(data)
        if (made := _TENSOR_RECIPES.get(data["do"])) is not None:
            return made(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the report holds a recipe that is incomplete: {error}") from error
    raise CheckpointError(f"the report holds a recipe of an unknown kind: {data['do']!r}")


def _fold_from(data: Data) -> FoldRecipe:
    given = data["origin"]
    if "layer" in given:
        origin: Layer | tuple[Link, ...] | Affine = _layer_from(given["layer"])
        target = given["layer"]["name"]
    elif "constants" in given:
        origin = tuple(map(Link, given["constants"]))
        target = given["constants"][0]["target"]
    else:
        target = "input"
        origin = Affine(
            torch.tensor(given["scale"], dtype=torch.float64),
            torch.tensor(given["shift"], dtype=torch.float64),
        )
    edits = [edit for move in data["moves"] for edit in move["edits"]]
    invertible = any(edit["inverse"] for edit in edits)
    invertible = invertible or any(move["part"] == "shift over scale" for move in data["moves"])
    requirements = Requirements(data["scales"], data["adds"], data["needs_positive"], invertible)
    moves = tuple(
        Move(Absorption(tuple(map(edit_from, move["edits"]))), move["part"])
        for move in data["moves"]
    )
    aliases = {edit["layer"]["name"]: tuple(edit["layer"]["aliases"]) for edit in edits}
    return FoldRecipe(target, origin, requirements, moves, aliases, data.get("neutral", {}))


def _merge_from(data: Data) -> MergeRecipe:
    terms = tuple(
        TermRecipe(
            term["weight"], term["bias"], tuple(term["at"]), tuple(map(Link, term["links"])),
            may_lack_bias="version" not in data,
        )
        for term in data["terms"]
    )  # fmt: skip
    return MergeRecipe(data["name"], data["name"], data["like"], data["groups"], terms)


def edit_from(data: Data) -> Edit:
    """Return what one layer absorbs, as a report says it."""
    index = data["index"]
    positions = torch.arange(index) if isinstance(index, int) else torch.tensor(index)
    layer = _layer_from(data["layer"])
    return Edit(layer, Side(data["side"]), positions, data["scale"], data["shift"], data["inverse"])


def _layer_data(layer: Layer, aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    def name(ref: TensorRef | None) -> str | None:
        return None if ref is None else ref.name

    return {
        "name": layer.name,
        "kind": layer.kind,
        "module": layer.module,
        "aliases": list(aliases.get(layer.name, ())),
        "cloned": layer.call is not None,
        "weight": name(layer.weight),
        "bias": name(layer.bias),
        "mean": name(layer.mean),
        "var": name(layer.var),
        "eps": layer.eps,
        "groups": layer.layout.groups,
        "transposed": layer.layout.transposed,
    }


def _layer_from(data: Data) -> Layer:
    if data["cloned"]:
        raise CheckpointError(f"{data['name']} was cloned (unshare); convert the model instead")

    def ref(key: str) -> TensorRef | None:
        return None if data[key] is None else TensorRef.of(data[key])

    return Layer(
        data["name"], data["kind"], cast(Node, None), data["module"], 0, 0, 0,
        KernelLayout(data["groups"], data["transposed"]), ref("weight"), ref("bias"), ref("mean"),
        ref("var"), data["eps"],
    )  # fmt: skip
