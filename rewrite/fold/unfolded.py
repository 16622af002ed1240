"""What folding leaves of a norm, and what stands before the model.

gain       n(x) * weight + bias                          ->  n(x)
leftover   (x - mean) / sqrt(var + eps) * weight + bias  ->  s.x + t, one multiply-add
input      model((x - mean) / std)                       ->  model'(x)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewrite.fold.candidates import Source
from rewrite.fold.recipes import AffineRecipe
from rewrite.fold.store import ModelStore
from rewrite.graph.editable import Editable
from rewrite.nn.modules import ChannelAffine
from rewrite.outcomes import Change


@dataclass(frozen=True, eq=False)
class UnfoldedNorm:
    """A norm that nothing absorbs, to be written as one multiply-add; and why nothing does."""

    source: Source
    reason: str

    def recipe(self) -> AffineRecipe:
        """Return what the norm becomes, under a name that is no module's yet."""
        layer = self.source.layer
        assert layer is not None and layer.mean is not None
        return AffineRecipe(self.source.target, layer, f"{self.source.first[0].name}.affine")

    def write(self, store: ModelStore, recipe: AffineRecipe) -> Change:
        """Put the multiply-add, whose tensors are in `store`, in place of the norm."""
        source, layer = self.source, recipe.layer
        refs = (layer.weight, layer.bias, layer.mean, layer.var)
        like = layer.weight or layer.mean
        assert like is not None
        trains = layer.weight is not None and store.get(like.name).requires_grad
        weight, bias = (store.beside[f"{recipe.name}.{attr}"] for attr in ("weight", "bias"))
        module = ChannelAffine(weight, bias, source.axis)
        for parameter in module.parameters():
            parameter.requires_grad_(trains)
        counter = "num_batches_tracked" in store.captured.module(source.target)._buffers
        name = store.captured.editor.substitute(source.first[0], module, "affine")
        places = (f"{name}.weight", f"{name}.bias", None, None)
        keys = {ref.name: new for ref, new in zip(refs, places, strict=True) if ref is not None}
        if counter:
            keys[f"{source.target}.num_batches_tracked"] = None
        return Change(
            source.target, source.before, f"one multiply-add, {name}", note=self.reason,
            touched=(name,), keys=keys, recipe=replace(recipe, name=name).to_data(),
        )  # fmt: skip


def drop_affine_part(captured: Editable, name: str) -> None:
    """Put a norm without weight and bias, otherwise the same, in place of one that has them."""
    old = captured.module(name)
    held = [key for key in ("weight", "bias") if key in old._parameters]
    captured.editor.replace(name, captured.editor.copied(old, dict.fromkeys(held)))
