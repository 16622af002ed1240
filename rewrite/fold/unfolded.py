"""What folding does beside removing norms: what is left, and what stands before the model.

leftover   (x - mean) / sqrt(var + eps) * weight + bias  ->  s.x + t, one multiply-add
input      model((x - mean) / std)                       ->  model'(x)
"""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.affine.algebra import Affine
from rewrite.affine.ledger import Ledger
from rewrite.fold.candidates import Source
from rewrite.graph.editor import Editor
from rewrite.nn.modules import ChannelAffine
from rewrite.outcomes import Change


@dataclass(frozen=True, eq=False)
class UnfoldedNorm:
    """A norm that nothing takes up, to be written as one multiply-add; and why nothing does."""

    source: Source
    reason: str

    def take(self, ledger: Ledger) -> Affine:
        """Return the map with all that the norm has taken up, which it need not be given then."""
        affine = self.source.affine(ledger)
        if self.source.layer is not None:
            ledger.forget(self.source.layer)
        return affine

    def write(self, editor: Editor, affine: Affine) -> Change:
        """Put the multiply-add in place of the norm."""
        source = self.source
        layer = source.layer
        assert layer is not None and layer.mean is not None
        old = editor.captured.tensor(layer.weight or layer.mean)
        module = ChannelAffine(affine.scale.to(old.dtype), affine.shift.to(old.dtype))
        for parameter in module.parameters():
            parameter.requires_grad_(layer.weight is not None and old.requires_grad)
        name = editor.substitute(source.first[0], module, "affine")
        keys: dict[str, str | None] = {
            ref.name: f"{name}.{ref.attr}" if ref.attr in ("weight", "bias") else None
            for ref in (layer.weight, layer.bias, layer.mean, layer.var)
            if ref is not None
        }
        return Change(
            source.target, source.before, f"one multiply-add, {name}", note=self.reason,
            touched=(name,), keys=keys,
        )  # fmt: skip
