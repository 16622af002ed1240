"""What a conversion of a folder will read and write, decided on its structure alone.

    passes on the model on meta -> recipes -> every tensor that they read or write, in the index
                                -> the configuration under which the class holds the result

Nothing is written before all of this is known. A class of the folder is loaded by its
configuration, so a norm keeps a weight (of ones) where the class says so, and a bias may appear
only where the configuration can ask for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError, OptionError
from rewrite.fold.recipes import from_data
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.safetensors_file import DTYPES, type_name
from rewrite.hub.structure import Structure, build, persistent
from rewrite.observe.recipe import KIND, ReaderRecipe
from rewrite.observe.stream_recipe import KIND as STREAM
from rewrite.observe.stream_recipe import StreamRecipe
from rewrite.outcomes import Change
from rewrite.pipeline import convert
from rewrite.protocol import Pass
from rewrite.report import Report
from rewrite.sharded.recipes import FolderRecipe, run, unmet

_BIAS_FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "add_bias_linear")
"""What configurations call the wish for biases."""


@dataclass(frozen=True)
class Made:
    """A tensor that a conversion writes: its type in the format's words, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FolderPlan:
    """Everything that is known before the first byte is written.

    Attributes:
        structure: the model on meta, as the folder has it.
        recipes: what is run, in order.
        made: the tensors that are written, by their name in the new folder.
        config: the new configuration.
        report: what the passes did and what they left alone.
    """

    structure: Structure
    recipes: Sequence[FolderRecipe]
    made: Mapping[str, Made]
    config: Mapping[str, Any]
    report: Report

    def place(self, name: str) -> str:
        """Return the name in the new folder of a tensor of the model."""
        return name if name in self.made else self.structure.stored.get(name, name)


def plan_folder(
    folder: CheckpointFolder,
    structure: Structure,
    passes: Pass | type[Pass] | str | Sequence[Pass | type[Pass] | str],
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> FolderPlan:
    """Decide everything; read no tensor.

    Raises:
        OptionError: a pass whose changes cannot be run tensor by tensor.
        CheckpointError: a tensor that is read or written is not in the folder as it has to be.
    """
    left: dict[str, str] = {}
    while True:
        plan = _planned(folder, structure, passes, only, (*skip, *left))
        wrong = _weighted(folder, plan)
        if wrong:
            left |= dict.fromkeys(wrong, "a norm of it has a weight that is not one: fold it first")
            continue
        if plan.config:
            break
        # The class cannot hold the result: the sites that add a bias are left alone.
        adding = {c.target for c in plan.report.changes if _adds_bias(c.recipe)}
        if not adding:
            kind = type(structure.model).__name__
            raise CheckpointError(f"{folder.path}: no configuration of {kind} holds the result")
        left |= dict.fromkeys(adding, "a bias would appear that its class cannot be asked for")
    return replace(plan, report=_with_reasons(plan.report, left))


def _planned(
    folder: CheckpointFolder, structure: Structure, passes: Any, only: Any, skip: Any
) -> FolderPlan:
    report = convert(structure.model, passes, only=only, skip=skip, verify=False).report
    recipes: list[FolderRecipe] = []
    for change in report.changes:
        known = change.recipe.get("do") in (KIND, STREAM)
        recipe = from_data(change.recipe) if known else None
        if isinstance(recipe, StreamRecipe):
            _check_map(change, structure)
            recipes.append(recipe)
        elif isinstance(recipe, ReaderRecipe):
            recipes.append(_kept(recipe))
        else:
            raise OptionError(
                f"{change.target}: its change cannot be run tensor by tensor; load the model and "
                "convert it in memory"
            )
    made = _dry_run(folder, structure, recipes)
    config = _config(folder, structure, made)
    return FolderPlan(structure, recipes, made, config or {}, report)


def _kept(recipe: ReaderRecipe) -> ReaderRecipe:
    """Return a recipe whose norm keeps its tensors: its class is told by the configuration."""
    if not recipe.gone:
        return recipe
    neutral = {recipe.weight: (1.0 - recipe.offset) / recipe.factor}
    if recipe.bias is not None:
        neutral[recipe.bias] = 0.0
    return replace(recipe, neutral=neutral, gone=())


def _dry_run(
    folder: CheckpointFolder, structure: Structure, recipes: Sequence[FolderRecipe]
) -> dict[str, Made]:
    """Run the recipes on tensors without numbers; return what they write."""
    edits = [edit for r in recipes if isinstance(r, ReaderRecipe) for edit in r.edits]
    new = {edit["into"] for edit in edits if _is_untied(folder, structure, edit)}
    store = _ShapeStore(folder, structure, new)
    for recipe in recipes:
        run(recipe, store)
    return {name: Made(type_name(t.dtype), tuple(t.shape)) for name, t in store.held.items()}


class _ShapeStore:
    """The tensors of a folder without their numbers; what is written stands beside them.

    Args:
        folder: the old folder.
        structure: which tensor of the folder each name of the model stands for.
        new: the names that get a tensor of their own, where they shared one.
    """

    def __init__(self, folder: CheckpointFolder, structure: Structure, new: set[str]) -> None:
        self.held: dict[str, Tensor] = {}
        self._folder, self._structure, self._new = folder, structure, new

    def get(self, name: str) -> Tensor:
        """Return a tensor on the meta device.

        Raises:
            CheckpointError: there is none, or it is of a type that is not computed with.
        """
        if self._place(name) in self.held:
            return self.held[self._place(name)]
        stored = self._structure.stored.get(name, name)
        if not self._folder.holds(stored):
            raise CheckpointError(
                f"{self._folder.path}: has no tensor {name}, which the plan reads"
            )
        entry = self._folder.entry(stored)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self._folder.path}: {stored} is of type {entry.dtype}, which is not computed "
                "with"
            )
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def set(self, name: str, tensor: Tensor) -> None:
        """Remember a tensor that is written."""
        self.held[self._place(name)] = tensor

    def delete(self, name: str) -> None:
        """Do nothing: the configuration says which tensors there are."""

    def _place(self, name: str) -> str:
        return name if name in self._new else self._structure.stored.get(name, name)


def _is_untied(folder: CheckpointFolder, structure: Structure, edit: Mapping[str, Any]) -> bool:
    """Return whether an edit gives a layer its own copy of a tensor that it shares.

    Raises:
        CheckpointError: the folder keeps the shared tensor under the name of that layer.
    """
    place = structure.stored.get(edit["into"])
    shared = {name for name, stored in structure.stored.items() if stored == place}
    if place is None or shared <= {edit["into"], *edit["aliases"]}:
        return False
    if place == edit["into"]:
        raise CheckpointError(
            f"{folder.path}: {place} is what its other layers share, too; load the model and "
            "convert it in memory"
        )
    return True


def _config(
    folder: CheckpointFolder, structure: Structure, made: Mapping[str, Made]
) -> dict[str, Any] | None:
    """Return the configuration under which the class holds the result, None without one."""
    own = dict(folder.config)
    appeared = [name for name in made if not folder.holds(name)]
    if not appeared:
        return own
    if any(name in structure.stored for name in appeared):
        own["tie_word_embeddings"] = False
    names = {*_present(structure), *made}
    flags = [flag for flag in _BIAS_FLAGS if own.get(flag) is False]
    for count in range(len(flags) + 1):
        for chosen in itertools.combinations(flags, count):
            config = {**own, **dict.fromkeys(chosen, True)}
            model = build(folder, config, meta_buffers=True)
            tensors = {
                **dict(model.named_parameters(remove_duplicate=False)), **persistent(model)
            }  # fmt: skip
            groups: dict[int, set[str]] = {}
            for name, tensor in tensors.items():
                groups.setdefault(id(tensor), set()).add(name)
            if all(group & names for group in groups.values()) and set(appeared) <= set(tensors):
                return config
    return None


def _present(structure: Structure) -> set[str]:
    """Return the names of a model that stand in its folder: one of those that share a tensor."""
    first = {place: name for name, place in reversed(list(structure.stored.items()))}
    return {place if place in structure.stored else name for place, name in first.items()}


def _adds_bias(recipe: Mapping[str, Any]) -> bool:
    edits = recipe.get("edits", ())
    return any(edit.get("shifts") and not edit["has_bias"] for edit in edits)


def _check_map(change: Change, structure: Structure) -> None:
    """Refuse a stream that was centred: its norms are of another class."""
    if change.recipe["map"]["kind"] == "centre":
        kind = type(structure.model).__name__
        raise OptionError(
            f"{change.target}: no configuration of {kind} asks for RMSNorms, so no folder can "
            "hold the result; load the model and convert it in memory"
        )


def _weighted(folder: CheckpointFolder, plan: FolderPlan) -> set[str]:
    """Return the sites that rely on a norm without weight where the folder has one."""

    def read(name: str) -> Tensor:
        return folder.read(plan.structure.stored.get(name, name))

    changes = list(plan.report.changes)
    return {changes[place].target for place in unmet(plan.recipes, read)}


def _with_reasons(report: Report, left: Mapping[str, str]) -> Report:
    """Return the report with the true reason of what was left alone here."""
    parts = tuple(
        replace(
            part,
            skips=tuple(
                replace(skip, reason=left[skip.target]) if skip.target in left else skip
                for skip in part.skips
            ),
        )
        for part in report.passes
    )
    return replace(report, passes=parts)
