"""What the tensors of a folder hold, as they are after the steps that were planned so far.

    value(name) = what the last step that writes it makes of the values before that step,
                  or what the folder holds

Nothing is kept: a tensor is read, or computed anew, when it is asked for. A step that writes many
tensors is run for one of them, and the others are let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.structure import Structure
from rewrite.sharded.recipes import Step, constant, run


@dataclass(frozen=True)
class FolderValues:
    """The values of tensors by their names in the model.

    Attributes:
        folder, structure: what the values are of.
        steps: what was planned, in order.
        written: the places that each step writes.
    """

    folder: CheckpointFolder
    structure: Structure
    steps: Sequence[Step]
    written: Sequence[frozenset[str]]

    def __call__(self, name: str) -> Tensor:
        """Return the values of a tensor.

        Raises:
            CheckpointError: the folder has none of that name, or its type is not computed with.
        """
        return self._before(len(self.steps), name)

    def _before(self, count: int, name: str) -> Tensor:
        for number in reversed(range(count)):
            if name in self.written[number]:
                if (value := constant(self.steps[number], name)) is not None:
                    return torch.full_like(self._before(number, name), value)
                store = _One(name, partial(self._before, number))
                run(self.steps[number], store)
                assert store.made is not None
                return store.made
        return self.folder.read(self.structure.stored_name(name))


class _One:
    """A store that keeps one of the tensors that are written."""

    def __init__(self, name: str, read: Callable[[str], Tensor]) -> None:
        self.made: Tensor | None = None
        self._name, self._read = name, read

    def get(self, name: str) -> Tensor:
        return self.made if name == self._name and self.made is not None else self._read(name)

    def set(self, name: str, tensor: Tensor) -> None:
        if name == self._name:
            self.made = tensor

    def delete(self, name: str) -> None:
        """Do nothing: no tensor that goes is asked for."""
