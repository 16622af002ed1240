"""Bake weight standardization away:  w = g (v − mean) / √(var + ε) + o  becomes one parameter.

The weight that the layer computed is the weight that it keeps, bit for bit; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.order import in_data_flow_order
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.standardization import is_standardized, weight_unrounded
from rewrite.weights.weight_norm import remove_weight_norm


@dataclass(frozen=True)
class RemoveStandardize(Pass):
    """Replace gain, offset and standardized weight by the weight that they make.

    Rewrites: layers that `WeightStandardize` made. Declines: those whose g, o or v another place
    holds too.
    """

    name: ClassVar[str] = "remove-standardize"
    contract: ClassVar[Contract] = Contract.EXACT

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every layer with a standardized weight."""
        for name, module in in_data_flow_order(captured):
            if not is_standardized(module):
                continue
            before = f"{type(module).__name__.removeprefix('Parametrized')} with standardization"
            place = f"{TensorRef(name, 'parametrizations').name}.weight"
            refs = [TensorRef(place, f"original{number}") for number in range(3)]
            tied = [other for ref in refs for other in captured.tied(ref)]
            if tied:
                yield Skip(name, before, f"is made of what {tied[0].name} holds too")
            else:
                yield Site(name, before, plan=tuple(ref.name for ref in refs))

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Bake the weight of one layer."""
        module = captured.module(site.target)
        weight = TensorRef(site.target, "weight").name
        captured.keep_exact({weight: weight_unrounded(module)})
        remove_weight_norm(captured.editor, module, "weight")
        *scales, v = site.plan
        keys: dict[str, str | None] = dict.fromkeys(scales)
        keys[v] = weight
        after = type(module).__name__
        return Change(site.target, site.before, after, touched=(site.target,), keys=keys)
