"""Weight norm put on, and taken off, as recipes of tensors by name.

    on     w -> g = ||w||, v = w          the norm over the inputs of each output unit
    off    g, v -> w = g v / ||v||        by the same code that computes it in the model

Both are computed as the model computes them, so that what is written is bit for bit what a model
in memory would hold. A weight that several modules share has several places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm

from rewrite.nn.weight_norm import WeightNorm
from rewrite.weights.tensor_recipe import Computed, Exact, TensorRecipe, TensorStore

ADDED, REMOVED = "weight-norm", "remove-weight-norm"


@dataclass(frozen=True)
class NormedWeight:
    """A weight, and its magnitudes and directions.

    Attributes:
        places: (weight, magnitudes, directions) by name, for each module that shares them.
        groups, inputs_first: the layout of the weight, where this toolkit computes it.
        dim: the axis of PyTorch's own weight norm, where that computes it, as [dim]; None for ours.
    """

    places: tuple[tuple[str, str, str], ...]
    groups: int = 1
    inputs_first: bool = False
    dim: tuple[int | None, ...] | None = None

    @classmethod
    def of(cls, step: nn.Module, places: tuple[tuple[str, str, str], ...]) -> Self | None:
        """Return what a parametrization computes; None if it is no weight norm."""
        if isinstance(step, WeightNorm):
            return cls(places, step.groups, step.inputs_first)
        if isinstance(step, TorchWeightNorm):
            return cls(places, dim=(step.dim,))
        return None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return what a report holds."""
        places = tuple((w, g, v) for w, g, v in data["places"])
        dim = None if data["dim"] is None else tuple(data["dim"])
        return cls(places, data["groups"], data["inputs_first"], dim)

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        return {
            "places": [list(names) for names in self.places],
            "groups": self.groups,
            "inputs_first": self.inputs_first,
            "dim": None if self.dim is None else list(self.dim),
        }

    def weight(self, g: Tensor, v: Tensor) -> Tensor:
        """Return the weight of its magnitudes and directions."""
        if self.dim is not None:
            made: Tensor = TorchWeightNorm(self.dim[0])(g, v)
            return made
        return WeightNorm(self.groups, self.inputs_first).forward(g, v)

    def unrounded(self, old: Tensor) -> Exact:
        """Return what magnitudes and directions of a weight are before they are rounded."""
        return {
            name: Computed(_part, self, old, which)
            for _, *parts in self.places
            for which, name in enumerate(parts)
        }

    def made(self, g: Tensor, v: Tensor) -> Exact:
        """Return what the weight of magnitudes and directions is before it is rounded."""
        exact = Computed(_weight, self, g, v)
        return {name: exact for name, *_ in self.places}

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return magnitudes and directions of a weight."""
        return WeightNorm(self.groups, self.inputs_first).right_inverse(weight)


@dataclass(frozen=True, eq=False)
class AddedWeightNorm(TensorRecipe):
    """The weights of one layer that are computed by a weight norm from now on.

    Attributes:
        target: the layer.
        weights: those weights.
        renamed: the tensors that only get another name, as their old form is given up.
    """

    target: str
    weights: tuple[NormedWeight, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the recipe that a report holds.

        Raises:
            KeyError: something is missing.
        """
        weights = tuple(map(NormedWeight.from_data, data["weights"]))
        return cls(data["target"], weights, dict(data["renamed"]))

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        weights = [weight.to_data() for weight in self.weights]
        renamed = dict(self.renamed)
        return {"do": ADDED, "target": self.target, "weights": weights, "renamed": renamed}

    def run(self, store: TensorStore, unrounded: Exact) -> None:
        """Write magnitudes and directions in the place of each weight."""
        for weight in self.weights:
            old = store.get(weight.places[0][0]).detach()
            g, v = weight.parts(old)
            for name, first, second in weight.places:
                store.set(first, g)
                store.set(second, v)
                store.delete(name)
            unrounded |= weight.unrounded(old)
        for before, after in self.renamed.items():
            store.set(after, store.get(before))
            store.delete(before)


@dataclass(frozen=True, eq=False)
class RemovedWeightNorm(TensorRecipe):
    """The weights of one layer that become plain tensors.

    Attributes:
        target: the layer.
        weights: those weights.
    """

    target: str
    weights: tuple[NormedWeight, ...]

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the recipe that a report holds.

        Raises:
            KeyError: something is missing.
        """
        return cls(data["target"], tuple(map(NormedWeight.from_data, data["weights"])))

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        weights = [weight.to_data() for weight in self.weights]
        return {"do": REMOVED, "target": self.target, "weights": weights}

    def run(self, store: TensorStore, unrounded: Exact) -> None:
        """Write each weight in the place of its magnitudes and directions."""
        for weight in self.weights:
            _, first, second = weight.places[0]
            g, v = store.get(first).detach(), store.get(second).detach()
            made = weight.weight(g, v)
            for name, *parts in weight.places:
                store.set(name, made)
                for part in parts:
                    store.delete(part)
            unrounded |= weight.made(g, v)


def _part(weight: NormedWeight, old: Tensor, which: int) -> Tensor:
    return weight.parts(old.double())[which]


def _weight(weight: NormedWeight, g: Tensor, v: Tensor) -> Tensor:
    return weight.weight(g.double(), v.double())
