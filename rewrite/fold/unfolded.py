"""What folding does beside removing norms: what is left, and what stands before the model.

leftover   (x - mean) / sqrt(var + eps) * weight + bias  ->  s.x + t, one multiply-add
input      model((x - mean) / std)                       ->  model'(x)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewrite.fold.candidates import Source
from rewrite.fold.recipes import AffineRecipe
from rewrite.fold.store import ModelStore
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
        module = ChannelAffine(weight, bias)
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
