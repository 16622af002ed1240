"""Weight normalization (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).

    w = g * v / ||v||          the norm over the inputs and the kernel of each output unit

g = ||w|| and v = w leave the function as it is, in train and in eval, for every input; what changes
is the geometry that an optimizer sees. Two options change the function on purpose:

    data_init   g <- g / std[t],  b <- (b - mean[t]) / std[t]    t the layer's own pre-activation
    mean_only   t - mean_batch[t] + b                            in train; the running mean in eval
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from rewrite.calibration.batches import first_batch
from rewrite.errors import OptionError
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.operators import conv_of, linear_of, norm_of
from rewrite.graph.order import in_data_flow_order
from rewrite.nn.mean_only import MeanOnlyBatchNorm
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.data_init import FITTED, Draft, fit_magnitudes
from rewrite.weights.fans import LAYER_KINDS, is_quantized_layer, layer_kind, listed_kinds
from rewrite.weights.layout import Layout
from rewrite.weights.weight_norm import (
    add_weight_norm,
    convert_old_weight_norm,
    has_old_weight_norm,
    share_weight_norm,
    weight_layouts,
    weight_refusal,
)
from rewrite.weights.weight_norm_recipe import AddedWeightNorm, NormedWeight


@dataclass(frozen=True)
class WeightNormPlan:
    """What happens to one module: new weight norms with their ties, or old ones converted."""

    module: nn.Module
    weights: dict[str, Layout] = field(default_factory=dict)
    ties: dict[str, tuple[TensorRef, ...]] = field(default_factory=dict)
    old: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightNorm(Pass):
    """Reparameterize weights by magnitude and direction.

    Rewrites:
      1. The weights of Linear, Conv and ConvTranspose (1d, 2d, 3d), Embedding, Bilinear, RNN, LSTM,
         GRU and their cells, and of MultiheadAttention, by output unit of their layout.
      2. Tied weights once, so that they stay tied.
      3. Old-style `weight_g`, `weight_v` (torch.nn.utils.weight_norm) into the new form, on the
         same two parameters.

    Declines: weights that are normed already, under another parametrization, lazy, integer,
    quantized or empty; embeddings with sparse gradients or `max_norm`; weights tied to something
    that has no output units; weights that code reads (F.linear) instead of a layer; layers all of
    whose parameters code reads (a momentum encoder); layers outside `kinds` and `min_size`.
    """

    name: ClassVar[str] = "weight-norm"
    contract: ClassVar[Contract] = Contract.EXACT

    kinds: str = field(
        default="",
        metadata={"help": f"only these kinds of layer, of {','.join(LAYER_KINDS)}; default all"},
    )
    min_size: int = field(default=0, metadata={"help": "leave weights with fewer elements"})
    data_init: bool = field(
        default=False,
        metadata={"help": "scale g and b on a batch to zero mean and unit variance"},
    )
    mean_only: bool = field(
        default=False, metadata={"help": "add mean-only batch normalization after each layer"}
    )
    momentum: float = field(
        default=0.1, metadata={"help": "of the running means of mean_only, 0.1 by default"}
    )

    def __post_init__(self) -> None:
        self._kinds()  # raises where one is unknown
        if self.min_size < 0:
            raise OptionError(f"{self.name}: min_size is {self.min_size}; pass 0 or more")
        if not 0 < self.momentum <= 1:
            raise OptionError(f"{self.name}: momentum is {self.momentum}; pass a number in (0, 1]")
        weakened = Contract.EXACT
        if self.mean_only:
            weakened = Contract.EXACT_IN_EVAL
        if self.data_init:
            weakened = Contract.REDEFINING
        if weakened is not Contract.EXACT:
            object.__setattr__(self, "contract", weakened)

    def _kinds(self) -> tuple[str, ...]:
        return listed_kinds(self.kinds, LAYER_KINDS, self.name) or LAYER_KINDS

    # -- find -------------------------------------------------------------------------------------

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every layer that has output units."""
        shared: set[int] = set()
        for name, module in in_data_flow_order(captured):
            if old := has_old_weight_norm(module):
                before = f"{type(module).__name__} with old-style weight norm"
                yield Site(name, before, plan=WeightNormPlan(module, old=old))
            elif weight_layouts(module):
                yield from self._layer(captured, name, module, shared)
            elif is_quantized_layer(module):
                reason = "weight is quantized; weight norm needs a plain tensor"
                yield Skip(name, type(module).__name__, reason)
        yield from _read_by_code(captured)

    def _layer(
        self, captured: Captured, name: str, module: nn.Module, shared: set[int]
    ) -> Iterator[Site | Skip]:
        before = type(module).__name__.removeprefix("Parametrized")
        if layer_kind(module) not in self._kinds():
            reason = f"is of kind {layer_kind(module)}, not of {self.kinds}"
            yield Skip(name, before, reason)
            return
        if (read := captured.code.read_whole(name) or captured.code.counted(name)) is not None:
            yield Skip(name, before, read)
            return
        plan = WeightNormPlan(module)
        for key, layout in weight_layouts(module).items():
            refusal = self._refusal(captured, module, TensorRef(name, key))
            weight = module._parameters.get(key)
            if refusal is None and id(weight) in shared:
                continue
            ties = refusal or _ties(captured, TensorRef(name, key), layout)
            if isinstance(ties, str):
                yield Skip(name, before, f"{key} {ties}")
                continue
            shared.add(id(weight))
            plan.weights[key], plan.ties[key] = layout, ties
        if plan.weights:
            yield Site(name, before, plan=plan)

    def _refusal(self, captured: Captured, module: nn.Module, ref: TensorRef) -> str | None:
        if (reason := weight_refusal(module, ref.attr)) is not None:
            return reason
        if captured.written(ref):
            return "is written by a forward"
        size = module._parameters[ref.attr].numel()  # type: ignore[union-attr]  # a weight that nothing refuses is there
        return f"has {size} elements, fewer than {self.min_size}" if size < self.min_size else None

    # -- rewrite ----------------------------------------------------------------------------------

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Reparameterize the weights of one layer and of those tied to it."""
        plan: WeightNormPlan = site.plan
        held = [plan.module._parameters[key] for key in plan.weights]
        for key in plan.old:
            convert_old_weight_norm(captured.editor, plan.module, key)
        touched, tied = [site.target], []
        for key, layout in plan.weights.items():
            add_weight_norm(captured.editor, plan.module, key, layout)
            for ref in plan.ties[key]:
                other = captured.module(ref.owner)
                share_weight_norm(captured.editor, plan.module, key, other, ref.attr)
                touched.append(ref.owner)
                tied.append(ref.name)
        after = f"{site.before.split(' ')[0]} with weight norm"
        note = f"tied to {', '.join(tied)}" if tied else ""
        keys: dict[str, str | None] = {}
        for key in plan.weights:
            for ref in (TensorRef(site.target, key), *plan.ties[key]):
                stem = f"{TensorRef(ref.owner, 'parametrizations').name}.{ref.attr}.original1"
                keys[ref.name] = stem
        for key in plan.old:
            stem = f"{TensorRef(site.target, 'parametrizations').name}.{key}.original"
            keys[TensorRef(site.target, f"{key}_g").name] = f"{stem}0"
            keys[TensorRef(site.target, f"{key}_v").name] = f"{stem}1"
        recipe = _recipe(captured, site.target, plan, keys)
        for weight, old in zip(recipe.weights, held, strict=True):
            if self.contract is Contract.EXACT and old is not None:
                captured.keep_exact(weight.unrounded(old.detach()))
        data = recipe.to_data()
        return Change(site.target, site.before, after, note, tuple(touched), keys, recipe=data)

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Reparameterize every site, then add means and fit to data where that is asked for."""
        batch = first_batch(calibration, f"{self.name}: data_init") if self.data_init else None
        centring = {s.target: self._centring(captured, s) for s in sites} if self.mean_only else {}
        drafts = {site.target: Draft(self.rewrite(captured, site)) for site in sites}
        for site in sites:
            if site.target in centring:
                self._centre(captured, site, drafts[site.target], centring[site.target])
        if self.data_init:
            fit_magnitudes(captured, sites, drafts, batch)
        return [draft.finished() for draft in drafts.values()]

    def _centring(self, captured: Captured, site: Site) -> str | None:
        """Return why no mean can be taken after a layer, or None."""
        plan: WeightNormPlan = site.plan
        if layer_kind(plan.module) not in FITTED:
            return f"no mean-only norm: {layer_kind(plan.module)} has no single pre-activation"
        prefix = f"{site.target}."
        for node in captured.nodes():
            if node.op == "get_attr" and str(node.target).startswith(prefix):
                return f"no mean-only norm: code reads {node.target}"
        for call in captured.calls(site.target):
            if any((n := norm_of(captured, u)) and n.kind == "batch" for u in call.users):
                return "no mean-only norm: a batch norm follows"
        return None

    def _centre(self, captured: Editable, site: Site, draft: Draft, refusal: str | None) -> None:
        if refusal is not None:
            draft.notes.append(refusal)
            return
        layer = site.plan.module
        weight = layer.weight
        units = int(layer.bias.numel()) if layer.bias is not None else _units(layer)
        norm = MeanOnlyBatchNorm(units, self.momentum, 1 if _is_conv(layer) else -1)
        norm = norm.to(device=weight.device, dtype=weight.dtype)
        if layer.bias is not None:
            captured.editor.share(norm, "bias", layer.bias)
            captured.editor.write(layer, "bias", None)
        pair = nn.Sequential(OrderedDict(layer=layer, mean=norm))
        draft.centred = norm
        captured.editor.replace(site.target, pair)
        target = site.target
        draft.keys = {
            old: None if new is None else f"{target}.layer.{new.removeprefix(f'{target}.')}"
            for old, new in draft.change.keys.items()
        }
        draft.keys[f"{target}.bias"] = f"{target}.mean.bias"
        draft.touched += [f"{target}.layer", f"{target}.mean"]
        draft.notes.append("mean-only batch norm after it")


def _ties(captured: Captured, ref: TensorRef, layout: Layout) -> tuple[TensorRef, ...] | str:
    """Return the other places of a weight, or why one of them stands in the way."""
    weight = captured.tensor(ref)
    ties = []
    for other in captured.tied(ref):
        module = captured.module(other.owner)
        if captured.tensor(other) is not weight:
            if other.owner == ref.owner:
                continue  # flattened recurrent weights share one storage without overlapping
            return f"shares its storage with {other.name}, which is another tensor"
        theirs = weight_layouts(module).get(other.attr)
        if theirs is None or theirs.inputs_first != layout.inputs_first:
            return f"is tied to {other.name}, whose output units are not the same"
        if theirs.inputs_first and theirs.groups != layout.groups:
            return f"is tied to {other.name}, whose groups are not the same"
        if (reason := weight_refusal(module, other.attr)) is not None:
            return f"is tied to {other.name}, which {reason}"
        ties.append(other)
    return tuple(ties)


def _recipe(
    captured: Captured, target: str, plan: WeightNormPlan, keys: Mapping[str, str | None]
) -> AddedWeightNorm:
    """Return what is done to one layer, by the names of its tensors."""
    weights = []
    for key, layout in plan.weights.items():
        places = []
        for ref in (TensorRef(target, key), *plan.ties[key]):
            for owner in (ref.owner, *captured.aliases(ref.owner)):
                stem = f"{TensorRef(owner, 'parametrizations').name}.{ref.attr}.original"
                places.append((TensorRef(owner, ref.attr).name, f"{stem}0", f"{stem}1"))
        groups = layout.groups if layout.inputs_first else 1
        weights.append(NormedWeight(tuple(places), groups, layout.inputs_first))
    old = {f"{TensorRef(target, key).name}_{part}" for key in plan.old for part in "gv"}
    renamed = {name: new for name, new in keys.items() if name in old and new is not None}
    return AddedWeightNorm(target, tuple(weights), renamed)


def _read_by_code(captured: Captured) -> Iterator[Skip]:
    """Yield the weights that a line of code applies, outside of any layer."""
    for node in captured.nodes():
        found = conv_of(captured, node) or linear_of(captured, node)
        if found is None or found.module is not None:
            continue
        if found.weight.attr in weight_layouts(captured.module(found.weight.owner)):
            continue  # a layer's own weight, read by hand: the layer's site covers it
        yield Skip(found.weight.name, "weight", "is applied by code, not by a layer")


def _is_conv(layer: nn.Module) -> bool:
    return layer_kind(layer) in ("conv", "conv_transpose")


def _units(layer: nn.Module) -> int:
    units = weight_layouts(layer)["weight"].units(layer.weight)  # type: ignore[arg-type]  # of a layer with a layout a Tensor
    return units.shape[0] * units.shape[1]
