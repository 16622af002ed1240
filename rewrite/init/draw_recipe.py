"""Weights drawn anew, as a recipe: by scheme, fans and a seed, from no tensor of the checkpoint.

    W ~ scheme(fans, gain; generator(seed, name of the map))        the rest becomes a constant

The stream of random numbers of a linear map is that of its name and the seed alone, so that each
tensor can be drawn by itself, and is the same wherever it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from rewrite.init.draw import draw, generator
from rewrite.init.schemes import Scheme
from rewrite.weights.fans import LinearMap
from rewrite.weights.layout import Layout
from rewrite.weights.tensor_recipe import Exact, TensorRecipe, TensorStore

DRAWN = "draw"


@dataclass(frozen=True)
class Draw:
    """One tensor that is drawn.

    Attributes:
        scheme: how.
        seed: of the random numbers.
        stem: what stands before the names of its maps, or of it itself where it has none.
        key: the name of the tensor in its module.
        maps: its linear maps; none for a free parameter.
        gain: of the activation that follows.
        padding: the row that is zero, if there is one.
    """

    scheme: Scheme
    seed: int
    stem: str
    key: str
    maps: tuple[LinearMap, ...]
    gain: float = 1.0
    padding: int | None = None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return what a report holds."""
        maps = tuple(
            LinearMap(
                held["parameter"], Layout(**held["layout"]), held["fan_in"], held["fan_out"],
                held["part"], None if held["rows"] is None else (held["rows"][0], held["rows"][1]),
            )
            for held in data["maps"]
        )  # fmt: skip
        return cls(**{**data, "scheme": Scheme(**data["scheme"]), "maps": maps})

    def values(self, shape: torch.Size) -> Tensor:
        """Return the tensor, in float64."""
        if not self.maps:
            return draw(self.scheme, None, shape, generator(self.seed, f"{self.stem}{self.key}"))
        value = torch.empty(shape, dtype=torch.float64)
        for linear_map in self.maps:
            random = generator(self.seed, f"{self.stem}{linear_map.label}")
            block = block_shape(linear_map, shape)
            linear_map.block(value).copy_(draw(self.scheme, linear_map, block, random, self.gain))
        if self.padding is not None:
            value[self.padding] = 0
        return value


@dataclass(frozen=True)
class Fill:
    """One tensor that becomes a constant, and the rows of it that become another, if there are any.

    Attributes:
        value: the constant.
        rows: (first, behind the last, their value).
    """

    value: float
    rows: tuple[int, int, float] | None = None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return what a report holds."""
        rows = data["rows"]
        return cls(data["value"], None if rows is None else (rows[0], rows[1], rows[2]))

    def values(self, shape: torch.Size) -> Tensor:
        """Return the tensor, in float64."""
        value = torch.full(shape, self.value, dtype=torch.float64)
        if self.rows is not None:
            first, last, other = self.rows
            value[first:last] = other
        return value


@dataclass(frozen=True, eq=False)
class DrawnTensors(TensorRecipe):
    """The tensors of one module that are made anew.

    Attributes:
        target: the module.
        tensors: the names that share a tensor, and what it becomes.
    """

    target: str
    tensors: tuple[tuple[tuple[str, ...], Draw | Fill], ...]

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the recipe that a report holds.

        Raises:
            KeyError: something is missing.
        """
        tensors: list[tuple[tuple[str, ...], Draw | Fill]] = []
        for held in data["tensors"]:
            drawn = "draw" in held
            made = Draw.from_data(held["draw"]) if drawn else Fill.from_data(held["fill"])
            tensors.append((tuple(held["names"]), made))
        return cls(data["target"], tuple(tensors))

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        tensors = [
            {"names": list(names), "draw" if isinstance(made, Draw) else "fill": _plain(made)}
            for names, made in self.tensors
        ]
        return {"do": DRAWN, "target": self.target, "tensors": tensors}

    def run(self, store: TensorStore, unrounded: Exact) -> None:
        """Write the new tensors, in the types of the old ones."""
        for names, made in self.tensors:
            old = store.get(names[0]).detach()
            new = old if old.is_meta else torch.empty_like(old).copy_(made.values(old.shape))
            for name in names:
                store.set(name, new)
                unrounded[name] = partial(made.values, old.shape)


def block_shape(linear_map: LinearMap, shape: torch.Size) -> torch.Size:
    """Return the shape of the rows of a tensor that belong to a linear map."""
    if linear_map.rows is None:
        return shape
    return torch.Size((linear_map.rows[1] - linear_map.rows[0], *shape[1:]))


def _plain(made: Draw | Fill) -> dict[str, Any]:
    held = asdict(made)
    if isinstance(made, Draw):
        held["maps"] = [dict(each) for each in held["maps"]]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in held.items()}
