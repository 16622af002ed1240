"""Weight standardization (Qiao et al. 2019, https://arxiv.org/abs/1903.10520).

    w = g (v − mean(v)) / √(var(v) + ε) + o      mean and variance over a unit's inputs and kernel

With g = √(var(w) + ε), o = mean(w), v = w the weight is what it was, in both modes; what changes is
the geometry that an optimizer sees. Recipes for small and for private batches put it beside
GroupNorm. (The paper has neither g nor o: it begins from random weights.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from rewrite.errors import OptionError
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.order import in_data_flow_order
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.fans import layer_kind, listed_kinds
from rewrite.weights.standardization import (
    sources_unrounded,
    standardization_refusal,
    standardize_weight,
)
from rewrite.weights.weight_norm import weight_layouts

_KINDS = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True)
class WeightStandardize(Pass):
    """Reparameterize the weights of layers by standardized weights.

    Rewrites: the weights of Conv and ConvTranspose (1d, 2d, 3d), and with `kinds` of Linear, by
    output unit of their layout.

    Declines: weights under another parametrization, lazy, integer, quantized or empty; weights that
    another place holds too; units with a single input; layers whose weight code reads.
    """

    name: ClassVar[str] = "weight-standardize"
    contract: ClassVar[Contract] = Contract.EXACT

    kinds: str = field(
        default="conv,conv_transpose",
        metadata={"help": f"kinds of layer, of {','.join(_KINDS)}; default conv,conv_transpose"},
    )
    eps: float = field(default=1e-5, metadata={"help": "added to the variance (default 1e-5)"})

    def __post_init__(self) -> None:
        self._kinds()  # raises where one is unknown
        if not 0 < self.eps < float("inf"):
            raise OptionError(f"{self.name}: eps is {self.eps}; pass a positive number")

    def _kinds(self) -> tuple[str, ...]:
        return listed_kinds(self.kinds, _KINDS, self.name)

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every layer of the kinds."""
        read = {str(node.target) for node in captured.nodes() if node.op == "get_attr"}
        for name, module in in_data_flow_order(captured):
            layouts = weight_layouts(module)
            if "weight" not in layouts or layer_kind(module) not in self._kinds():
                continue
            before = type(module).__name__.removeprefix("Parametrized")
            reason = standardization_refusal(module, layouts["weight"])
            ref = TensorRef(name, "weight")
            if reason is None and (tied := captured.tied(ref)):
                reason = f"is tied to {tied[0].name}"
            if reason is None and captured.written(ref):
                reason = "is written by a forward"
            if reason is None and ref.name in read:
                reason = "is read by code, too"
            code = captured.code
            if (
                reason is None
                and (whole := code.read_whole(name) or code.counted(name)) is not None
            ):
                reason = f"is read by code, too: {whole}"
            if reason is None:
                yield Site(name, before, plan=layouts["weight"])
            elif "already" not in reason:
                yield Skip(name, before, f"weight {reason}")

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Reparameterize the weight of one layer."""
        module = captured.module(site.target)
        standardize_weight(captured.editor, module, site.plan, self.eps)
        ref = TensorRef(site.target, "weight")
        place = f"{TensorRef(site.target, 'parametrizations').name}.weight"
        captured.keep_exact(sources_unrounded(module, place))
        after = f"{site.before} with weight standardization"
        return Change(
            site.target, site.before, after, touched=(site.target,),
            keys={ref.name: f"{place}.original2"},
        )  # fmt: skip
