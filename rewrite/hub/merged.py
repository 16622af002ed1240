"""Tensors that transformers assembles from several stored ones when it loads a folder.

    T[e] = cat([A_e, B_e])       stored expert by expert, a single tensor in the model

The layout of the folder is kept: such a tensor is read from its parts, and split into them again
when it is written. The assembled tensor is held in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.files.safetensors_header import Entry


@dataclass(frozen=True)
class Merged:
    """One assembled tensor.

    Attributes:
        groups: names in the folder; each group is stacked along a new first axis, and the stacks
            are concatenated.
        axis: the axis of the stacks along which they are concatenated, at least 1.
    """

    groups: tuple[tuple[str, ...], ...]
    axis: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts in the folder, group by group."""
        return tuple(name for group in self.groups for name in group)

    def entry(self, entry_of: Callable[[str], Entry]) -> Entry:
        """Return dtype, shape and size of the assembled tensor; its offset is meaningless."""
        first = [entry_of(group[0]) for group in self.groups]
        shape = [len(self.groups[0]), *first[0].shape]
        shape[self.axis] = sum((1, *entry.shape)[self.axis] for entry in first)
        size = sum(entry_of(name).size for name in self.parts)
        return Entry(first[0].dtype, tuple(shape), 0, size)

    def fits(self, entry_of: Callable[[str], Entry]) -> bool:
        """Return whether the parts have one dtype, and shapes that can be stacked and joined."""
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
        """Return the assembled tensor; `read` returns a part by its name."""
        stacks: list[list[Tensor]] = [[read(name) for name in group] for group in self.groups]
        return torch.cat([torch.stack(stack) for stack in stacks], self.axis)

    def split(
        self, tensor: Tensor, entry_of: Callable[[str], Entry]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each part's name in the folder and its values, the inverse of `read`."""
        at = 0
        for group in self.groups:
            length = (1, *entry_of(group[0]).shape)[self.axis]
            block = tensor.narrow(self.axis, at, length)
            at += length
            for name, part in zip(group, block, strict=True):
                yield name, part.contiguous()
