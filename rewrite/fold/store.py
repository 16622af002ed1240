"""Where a recipe's tensors live: in a captured model, or in a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.layers import Layer
from rewrite.errors import CheckpointError
from rewrite.fold.executor import names_of
from rewrite.fold.recipes import AffineRecipe, FoldRecipe, MergeRecipe, Recipe
from rewrite.graph.captured import TensorRef
from rewrite.graph.editable import Editable
from rewrite.weights.tensor_recipe import Exact


class StateDictStore:
    """A state dict that is not changed: what is written stands in a copy.

    Args:
        state: the checkpoint.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)

    def get(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name in self.state:
            return self.state[name]
        ref = TensorRef.of(name)
        computed = (TensorRef(ref.owner, f"parametrizations.{ref.attr}.").name, f"{name}_orig")
        if any(key.startswith(computed) for key in self.state):
            raise CheckpointError(
                f"{name} is computed from other tensors in this checkpoint, by more than a "
                "weight norm; convert the model instead"
            )
        raise CheckpointError(f"the checkpoint has no {name}: it is of another model")

    def set(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in.

        Raises:
            CheckpointError: `name` is the key of a layer, and not the name of a tensor.
        """
        if ":" in name:
            layer, _, attr = name.partition(":")
            raise CheckpointError(f"{layer}: the name of its new {attr} is not in the map")
        self.state[name] = tensor

    def delete(self, name: str) -> None:
        """Take a tensor away, if it is there."""
        self.state.pop(name, None)


class ModelStore:
    """The tensors of a captured model, written by its editor.

    Args:
        captured: the model.
        recipes: what is going to be run on it.

    Attributes:
        beside: what was written for modules that the model does not have yet, by name.
    """

    def __init__(self, captured: Editable, recipes: Sequence[Recipe]) -> None:
        self.captured = captured
        self.beside: dict[str, Tensor] = {}
        made = [r for r in recipes if isinstance(r, AffineRecipe | MergeRecipe)]
        self._new = tuple(f"{recipe.name}." for recipe in made)
        self._unnamed: dict[str, tuple[Layer, str]] = {}
        self._places: dict[str, list[str]] = {}
        self._calls: dict[str, dict[Node, dict[str, Tensor]]] = {}
        for recipe in recipes:
            for layer in recipe.layers() if isinstance(recipe, FoldRecipe) else ():
                for attr in ("weight", "bias"):
                    (name, *_) = names_of(layer, attr)
                    if ":" in name:
                        self._unnamed[name] = (layer, attr)

    def get(self, name: str) -> Tensor:
        """Return a tensor of the model; a vector with its values, wherever those are."""
        ref = TensorRef.of(name)
        tensor = self.captured.tensor(ref)
        return self.captured.values(ref) if tensor.ndim <= 1 else tensor

    def set(self, name: str, tensor: Tensor) -> None:
        """Give a layer its new tensor; one that is meant at single calls gets it in `finish`.

        A model without values stays without.
        """
        if self.captured.numbers is not None:
            tensor = tensor.to("meta")
        if name in self._unnamed:
            layer, attr = self._unnamed[name]
            if layer.call is not None and layer.module is not None:
                at = self._calls.setdefault(layer.module, {})
                at.setdefault(layer.call, {})[attr] = tensor
                return
            ref = self.captured.editor.set_argument(layer.node, 2, attr, tensor)
            self._places[name] = [ref.name]
            return
        if name.startswith(self._new):
            self.beside[name] = tensor
            return
        ref = TensorRef.of(name)
        if self.captured.tree.name(self.captured.module(ref.owner)) == ref.owner:
            self.captured.editor.set_tensor(ref, tensor)

    def delete(self, name: str) -> None:
        """Do nothing: a tensor goes with the module or the line that is taken out."""

    def finish(self) -> tuple[str, ...]:
        """Clone the layers that are other ones at other calls; return the names of the clones."""
        clones: list[str] = []
        for module, tensors in self._calls.items():
            clones += self._separate(module, tensors)
        return tuple(clones)

    def named(self, exact: Exact) -> Exact:
        """Return what was written by the names that the tensors have in the model now."""
        return {place: e for name, e in exact.items() for place in self._places.get(name, [name])}

    def _separate(self, name: str, tensors: dict[Node, dict[str, Tensor]]) -> list[str]:
        """Set the tensors of the calls of one module, and clone it where they differ."""
        groups: list[tuple[list[Node], dict[str, Tensor]]] = []
        for call, new in tensors.items():
            for members, held in groups:
                if held.keys() == new.keys() and all(torch.equal(held[k], new[k]) for k in new):
                    members.append(call)
                    break
            else:
                groups.append(([call], new))
        keeps_old = len(tensors) < len(self.captured.calls(name))
        clones = []
        for number, (members, new) in enumerate(groups):
            if number == 0 and not keeps_old:
                for attr, tensor in new.items():
                    self.captured.editor.set_tensor(TensorRef(name, attr), tensor)
                    self._note(name, members, attr, name)
                continue
            for call in members:
                clone = self._clone(name, call, new)
                for attr in new:
                    self._note(name, [call], attr, clone)
                clones.append(clone)
        return clones

    def _note(self, name: str, calls: list[Node], attr: str, place: str) -> None:
        for call in calls:
            self._places.setdefault(f"{name} at {call.name}:{attr}", []).append(f"{place}.{attr}")

    def _clone(self, name: str, call: Node, new: Mapping[str, Tensor]) -> str:
        old = self.captured.module(name)
        clone = self.captured.editor.copied(old, new)
        leaf = name.rpartition(".")[2]
        leaf = f"{leaf}_clone" if not leaf.isdigit() else f"layer{leaf}_clone"
        return self.captured.editor.merge(call, lambda line: line.all_input_nodes[0], clone, leaf)
