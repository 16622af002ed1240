"""Tensors that a class of transformers puts together when it loads a folder.

    T[e] = cat([A_e, B_e])       what lies in the folder expert by expert, and is one in the model

A folder keeps its own form: such a tensor is read of its parts, and written into them again. All of
it is in memory at once, as it is in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.hub.safetensors_file import Entry


@dataclass(frozen=True)
class Merged:
    """One such tensor.

    Attributes:
        groups: names in the folder; each group is stacked along a new first axis, and the stacks
            are put one behind the other.
        axis: of the stacks, along which that is done.
    """

    groups: tuple[tuple[str, ...], ...]
    axis: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The names in the folder."""
        return tuple(name for group in self.groups for name in group)

    def entry(self, entry_of: Callable[[str], Entry]) -> Entry:
        """Return type, shape and size of the whole; its bytes are in no one place."""
        first = [entry_of(group[0]) for group in self.groups]
        shape = [len(self.groups[0]), *first[0].shape]
        shape[self.axis] = sum((1, *entry.shape)[self.axis] for entry in first)
        size = sum(entry_of(name).size for name in self.parts)
        return Entry(first[0].dtype, tuple(shape), 0, size)

    def fits(self, entry_of: Callable[[str], Entry]) -> bool:
        """Return whether the parts are of one type, and of shapes that can be put together."""
        alike = {len(group) for group in self.groups}
        types = {entry_of(name).dtype for name in self.parts}
        rest = set()
        for group in self.groups:
            shapes = {entry_of(name).shape for name in group}
            if len(shapes) != 1:
                return False
            shape = (1, *shapes.pop())
            if not 0 < self.axis < len(shape):
                return False
            rest.add(shape[: self.axis] + shape[self.axis + 1 :])
        return len(alike) == len(types) == len(rest) == 1

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the whole, part by part."""
        stacks: list[list[Tensor]] = [[read(name) for name in group] for group in self.groups]
        return torch.cat([torch.stack(stack) for stack in stacks], self.axis)

    def split(
        self, tensor: Tensor, entry_of: Callable[[str], Entry]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the name in the folder and the values of each part."""
        at = 0
        for group in self.groups:
            length = (1, *entry_of(group[0]).shape)[self.axis]
            block = tensor.narrow(self.axis, at, length)
            at += length
            for name, part in zip(group, block, strict=True):
                yield name, part.contiguous()
