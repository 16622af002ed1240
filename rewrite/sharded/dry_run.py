"""Steps run on tensors without numbers: what they read, write and take away, before any byte is.

Every tensor that a step reads or writes is found in the index with its type and shape, or this
says which one is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError
from rewrite.fold.recipes import FoldRecipe
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.safetensors_file import DTYPES
from rewrite.hub.structure import Structure
from rewrite.observe.recipe import ReaderRecipe
from rewrite.sharded.recipes import FolderRecipe, Step, run


@dataclass(frozen=True)
class Touched:
    """What one step did to the names of a model.

    Attributes:
        written: the names of the tensors that it wrote.
        appeared: those that the folder has not, under no name.
        gone: the names of tensors that it took away.
    """

    written: frozenset[str]
    appeared: frozenset[str]
    gone: frozenset[str]


class ShapeStore:
    """The tensors of a folder without their numbers; what is written stands beside them.

    Args:
        folder: the old folder.
        structure: which tensor of the folder each name of the model stands for.

    A fold is told the values of vectors: whether a bias appears depends on them.

    Attributes:
        held: what was written, by its name in the new folder.
        ever: the same, with what was taken away again.
        gone: the tensors of the old folder that were taken away.
    """

    def __init__(self, folder: CheckpointFolder, structure: Structure) -> None:
        self.held: dict[str, Tensor] = {}
        self.ever: dict[str, Tensor] = {}
        self.gone: set[str] = set()
        self._folder, self._structure = folder, structure
        self._new: set[str] = set()
        self._written: set[str] = set()
        self._deleted: set[str] = set()
        self._values: Callable[[str], Tensor] | None = None

    def run(self, step: Step, values: Callable[[str], Tensor]) -> Touched:
        """Run one step; return what it touched.

        Args:
            step: it.
            values: returns a tensor as it is before the step, by its name in the model.

        Raises:
            CheckpointError: a tensor that it reads is not in the folder as it has to be.
        """
        self._new |= _untied(self._folder, self._structure, step)
        self._written, self._deleted = set(), set()
        self._values = values if any(isinstance(r, FoldRecipe) for r in step) else None
        run(step, self)
        kept = {self.place(name) for name in self._written}
        gone = {name for name in self._deleted if self.place(name) not in kept}
        self.gone |= {self.place(name) for name in gone}
        self.gone -= kept
        appeared = {n for n in self._written if not self._folder.holds(self.place(n))}
        return Touched(frozenset(self._written), frozenset(appeared), frozenset(gone))

    def get(self, name: str) -> Tensor:
        """Return a tensor on the meta device.

        Raises:
            CheckpointError: there is none, or it is of a type that is not computed with.
        """
        if self.place(name) in self.held:
            return self._told(name, self.held[self.place(name)])
        stored = self._structure.stored_name(name)
        if not self._folder.holds(stored) or self.place(name) in self.gone:
            raise CheckpointError(
                f"{self._folder.path}: has no tensor {name}, which the plan reads"
            )
        entry = self._folder.entry(stored)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self._folder.path}: {stored} is of type {entry.dtype}, which is not computed "
                "with"
            )
        empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        return self._told(name, empty)

    def _told(self, name: str, empty: Tensor) -> Tensor:
        return empty if self._values is None or empty.ndim > 1 else self._values(name)

    def set(self, name: str, tensor: Tensor) -> None:
        """Remember a tensor that is written."""
        self.held[self.place(name)] = self.ever[self.place(name)] = tensor.to("meta")
        self._written.add(name)

    def delete(self, name: str) -> None:
        """Forget a tensor that goes."""
        self.held.pop(self.place(name), None)
        self._deleted.add(name)

    def place(self, name: str) -> str:
        """Return the name in the new folder of a tensor of the model."""
        return name if name in self._new else self._structure.stored_name(name)


def _untied(folder: CheckpointFolder, structure: Structure, step: Step) -> set[str]:
    """Return the names to which a step gives a tensor of their own, where they shared one."""
    edits = [edit for r in step if isinstance(r, ReaderRecipe) for edit in r.edits]
    return {edit["into"] for edit in edits if _is_untied(folder, structure, edit)}


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


def adds_bias(recipe: FolderRecipe) -> bool:
    """Return whether a recipe gives a layer a bias that it had not."""
    edits = recipe.edits if isinstance(recipe, ReaderRecipe) else ()
    return any(edit["shifts"] and not edit["has_bias"] for edit in edits)
