"""A change of single tensors as plain data: which are read by name, which are written, which go.

A recipe is made where a pass plans, and run on whatever holds the tensors: a state dict, or the
shards of a checkpoint folder, one tensor at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from rewrite.weights.scaling import Scaling

Exact = dict[str, Callable[[], Tensor]]
"""What written tensors are before they are rounded, in float64, by name; computed when asked."""


class Computed(partial[Tensor]):
    """Computes in float64 what is stored as the model computes it, in its own precision.

    What is stored is then within a few roundings of it, and not its nearest value.
    """

    roundings: ClassVar[int] = 16
    """By how many roundings of its size a stored value may be off.

    Its size is its absolute value, or what the method `terms` of a subclass returns: the size of
    the terms whose sum it is.
    """


class TensorStore(Protocol):
    """Tensors by name: a model, a state dict, or files that hold one shard each."""

    def get(self, name: str) -> Tensor:
        """Return a tensor; raise `CheckpointError` if there is none of that name."""
        ...

    def set(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in the place of the one of that name, or beside the others."""
        ...

    def delete(self, name: str) -> None:
        """Take a tensor away, if there is one of that name."""
        ...


ScalingOf = Callable[[Sequence[int], torch.device], Scaling]
"""Returns what multiplies a tensor, given its shape and device."""


@runtime_checkable
class FileStore(TensorStore, Protocol):
    """Tensors in files: their types are known, and they are scaled, without being held whole."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        ...

    def scale(self, source: str, names: Sequence[str], scaling: ScalingOf) -> bool:
        """Put the product of the tensor `source` under `names`; return whether that was done.

        It is not where the tensor lies in no file as it is now.

        Raises:
            CheckpointError: the product holds values that are not finite.
        """
        ...


def store_dtype(store: TensorStore, name: str) -> torch.dtype:
    """Return the type of a tensor, which is not read for it where the store knows it."""
    return store.dtype(name) if isinstance(store, FileStore) else store.get(name).dtype


def scale_in_files(
    store: TensorStore, source: str, names: Sequence[str], scaling: ScalingOf
) -> bool:
    """Put the product of a tensor under `names` if it goes from file to file; return whether."""
    return isinstance(store, FileStore) and store.scale(source, names, scaling)


class TensorRecipe(ABC):
    """A recipe that needs nothing but tensors by name."""

    target: str
    """The name to report."""

    @abstractmethod
    def run(self, store: TensorStore, unrounded: Exact) -> None:
        """Write the new tensors of `store` and take away those that go.

        Args:
            store: what is read and written; tensors without numbers (meta) give such tensors.
            unrounded: what tensors that were written before are; it is told of the new ones.

        Raises:
            CheckpointError: a tensor is missing.
        """

    @abstractmethod
    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
