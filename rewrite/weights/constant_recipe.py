"""A new tensor that holds one number, as a recipe: name = (value, …, value)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from rewrite.errors import CheckpointError
from rewrite.weights.tensor_recipe import Exact, TensorRecipe, TensorStore

KIND = "constant"
"""What a report calls it."""

_LARGEST = 1 << 20
"""Numbers in a new tensor, which has one a channel."""


@dataclass(frozen=True, eq=False)
class ConstantRecipe(TensorRecipe):
    """A new tensor of one number.

    Attributes:
        target: its name.
        value: the number.
        shape: how many of it.
        like: the name of a tensor of its dtype and device.
    """

    target: str
    value: float
    shape: tuple[int, ...]
    like: str

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the recipe that a report holds.

        Raises:
            KeyError: something is missing.
            CheckpointError: it asks for a shape that no channels have.
        """
        shape = tuple(int(size) for size in data["shape"])
        if min(shape, default=0) < 1 or math.prod(shape) > _LARGEST:
            raise CheckpointError(f"{data['target']}: the report gives it the shape {list(shape)}")
        return cls(data["target"], float(data["value"]), shape, data["like"])

    def run(self, store: TensorStore, unrounded: Exact) -> None:
        """Write the tensor.

        Raises:
            CheckpointError: there is one of its name.
        """
        like = store.get(self.like)
        try:
            store.get(self.target)
        except CheckpointError:
            store.set(self.target, like.new_full(self.shape, self.value))
        else:
            raise CheckpointError(f"the checkpoint has {self.target} already: it is converted")

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        return {"do": KIND, **asdict(self), "shape": list(self.shape)}
