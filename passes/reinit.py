"""Initialize a model anew: by scheme, by true fans, by the activation that really follows.

    Var w = gain^2 / fan            (He; the other schemes are in rewrite.initialization)

with `fan` from the layer's connectivity (rewrite.fans) and `gain` from the graph
(rewrite.following). Norms become the identity, biases zero, running statistics those of a fresh
layer. On top of that, on request:

    residual=zero      the last scale of each residual branch is 0      (Goyal et al. 2017, 5.1)
    residual=depth     ... times 1 / sqrt(number of branches) = 1 / sqrt(2 L)    (GPT-2)
    residual=fixup     ... is 0, the layers before it times branches^(-1 / (2 m - 2)), m layers in
                       the branch                                        (Zhang et al. 2019)
    lsuv=true          w <- w / std(y) until Var y = 1, layer by layer   (Mishkin & Matas 2016)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import nn

from rewrite.calibration.batches import first_batch
from rewrite.errors import OptionError
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.order import in_data_flow_order
from rewrite.init.layers import ModulePlan, Weight, functional_weights, module_plan, write
from rewrite.init.lsuv import fit_unit_variance
from rewrite.init.rules import Rule, check_used, first_match, parse_rules
from rewrite.init.scale_residuals import scale_residuals
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.fans import is_quantized_layer, layer_kind, linear_maps


@dataclass(frozen=True)
class Reinitialize(Pass):
    """Draw the weights of a model anew.

    Rewrites:
      1. Linear maps: Linear, convolutions, Embedding, Bilinear, attention's projections, every gate
         of a recurrent layer by itself, and weights that code applies (F.linear, F.conv2d).
      2. Norms: weight 1, bias 0, fresh running statistics. PReLU: its default slope.
      3. Biases: zero, but `forget_bias` for the forget gates of an LSTM.
      4. Parametrized weights through their parametrization, tied weights once.

    Declines: frozen parameters (unless `frozen`), quantized and lazy ones, parametrizations without
    an inverse, shapes that a scheme is not defined for, free parameters (position embeddings, class
    tokens) under a scheme that needs fans, and layers that no rule names.
    """

    name: ClassVar[str] = "reinit"
    contract: ClassVar[Contract] = Contract.REDEFINING
    flag_value: ClassVar[str | None] = "SCHEME"

    scheme: str = field(
        default="he",
        metadata={"help": "a scheme (he, glorot:normal ...), or rules PATTERN=SCHEME;..."},
    )
    mode: str = field(default="", metadata={"help": "fan_in, fan_out or fan_avg"})
    activation: str = field(
        default="", metadata={"help": "take the gain for this one, not for the one that follows"}
    )
    residual: Literal["none", "zero", "depth", "fixup"] = field(
        default="none", metadata={"help": "what to do with residual branches"}
    )
    lsuv: bool = field(
        default=False, metadata={"help": "scale each layer to unit variance on a batch"}
    )
    tolerance: float = field(
        default=0.01, metadata={"help": "of lsuv: how far a variance may be from 1"}
    )
    iterations: int = field(default=10, metadata={"help": "of lsuv: rescalings of one layer"})
    forget_bias: float = field(default=0.0, metadata={"help": "bias of an LSTM's forget gates"})
    frozen: bool = field(default=False, metadata={"help": "also what requires no gradient"})
    seed: int = field(default=0, metadata={"help": "of the random numbers"})

    def __post_init__(self) -> None:
        self.rules()
        if self.residual not in ("none", "zero", "depth", "fixup"):
            raise OptionError(
                f"{self.name}: unknown residual {self.residual!r}; "
                "known are none, zero, depth, fixup"
            )
        if not self.tolerance > 0:
            raise OptionError(f"{self.name}: tolerance is {self.tolerance}; pass more than 0")
        if self.iterations < 1:
            raise OptionError(f"{self.name}: iterations is {self.iterations}; pass 1 or more")

    @classmethod
    def from_flag(cls, values: Sequence[str]) -> Self:
        """Return the pass for `--reinit VALUE --reinit VALUE ...`; earlier values win."""
        return cls(scheme=";".join(values))

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules that the options say."""
        return parse_rules(self.scheme, self.mode, self.activation)

    # -- find -------------------------------------------------------------------------------------

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every module that holds something to initialize.

        Raises:
            OptionError: a pattern matches nothing.
        """
        rules, used, names = self.rules(), set[Rule](), list[str]()
        drawn: set[int] = set()
        applied = functional_weights(captured)
        for name, module in self._tied_last(captured):
            if "parametrizations" in name.split("."):
                continue  # written through the layer whose weight they make
            if is_quantized_layer(module):
                yield Skip(name, type(module).__name__, "weight is quantized")
            kind = layer_kind(module) if linear_maps(module) else ""

            def rule_for(key: str, name: str = name, kind: str = kind) -> Rule | None:
                full = f"{name}.{key}" if name else key
                rule = first_match(rules, (name, full), kind)
                if rule is not None:
                    used.add(rule)
                return rule

            plan, skips = module_plan(
                captured, name, module, rule_for, drawn, applied, include_frozen=self.frozen
            )
            if plan.weights or plan.resets or skips:
                names.append(name)
            yield from skips
            if plan.weights or plan.resets:
                yield Site(name, type(module).__name__.removeprefix("Parametrized"), plan=plan)
        check_used(rules, used, names)

    def _tied_last(self, captured: Captured) -> Iterator[tuple[str, nn.Module]]:
        """Yield modules in data-flow order, embeddings last: what ties decides for both.

        A decoder's scale (fan_in = features) suits an embedding tied to it; one row a token would
        make the logits too large by sqrt(features).
        """
        modules = in_data_flow_order(captured)
        later = [m for m in modules if isinstance(m[1], nn.Embedding | nn.EmbeddingBag)]
        yield from (m for m in modules if not isinstance(m[1], nn.Embedding | nn.EmbeddingBag))
        yield from later

    # -- rewrite ----------------------------------------------------------------------------------

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Initialize one module."""
        plan: ModulePlan = site.plan
        metrics, recipe = write(captured, site.target, plan, self.seed, self.forget_bias)
        shown = dict.fromkeys(weight.describe() for weight in plan.weights)
        after = ", ".join(shown) or "fresh"
        touched = (site.target, *(ref.owner for w in plan.weights for ref in w.ties))
        return Change(
            site.target, site.before, after, plan.note, touched, metrics=metrics, recipe=recipe
        )

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Initialize every site, then fit to data and see to the residual branches."""
        batch = first_batch(calibration, f"{self.name}: lsuv") if self.lsuv else None
        changes = {site.target: self.rewrite(captured, site) for site in sites}
        notes: dict[str, list[str]] = {}
        if self.lsuv:
            weights = {site.target: _single(site.plan) for site in sites}
            fit_unit_variance(
                captured,
                batch,
                {name: weight for name, weight in weights.items() if weight is not None},
                self.tolerance,
                self.iterations,
                notes,
            )
        extra: list[Change] = []
        if self.residual != "none":
            allowed = {site.target for site in sites}
            extra = scale_residuals(captured, self.residual, allowed, notes)
        return [*(_noted(change, notes) for change in changes.values()), *extra]


def _single(plan: ModulePlan) -> Weight | None:
    """Return the weight of a module that has one linear map and nothing tied to it."""
    found = [weight for weight in plan.weights if weight.maps]
    if len(found) != 1 or len(found[0].maps) != 1 or found[0].ties:
        return None
    return found[0]


def _noted(change: Change, notes: dict[str, list[str]]) -> Change:
    added = notes.get(change.target, [])
    if not added:
        return change
    # What was added is of the data or of the graph, and is no part of the recipe.
    note = "; ".join(filter(None, [change.note, *added]))
    return Change(
        change.target, change.before, change.after, note, change.touched, change.keys,
        change.metrics,
    )  # fmt: skip
