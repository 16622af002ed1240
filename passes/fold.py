"""Folding: a norm in eval mode is an affine map per channel, and other layers absorb it.

    y = (x - mean) / sqrt(var + eps) * weight + bias = s.x + t,   s = weight / sqrt(var + eps)

    W*x + b, then s, t     ->   (s.W)*x + (s.b + t)
    s, t, then W*x + b     ->   (W.s)*x + (b + W*t)     where padding adds no zeros, or t = 0

Everything is computed in float64 and rounded once. What cannot be moved exactly stays, with the
reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from rewrite.errors import CheckpointError, OptionError, PassError
from rewrite.fold.branches.find import Branches
from rewrite.fold.branches.kernel import Merge
from rewrite.fold.branches.merge import merge_site
from rewrite.fold.candidates import Source, sources
from rewrite.fold.executor import run_recipes
from rewrite.fold.folder import Fold, Folder
from rewrite.fold.input_norm import InputNorm, fold_input, parse_input_norm
from rewrite.fold.observed import carry_out
from rewrite.fold.recipes import AffineRecipe, FoldRecipe, recipe_of
from rewrite.fold.store import ModelStore
from rewrite.fold.unfolded import UnfoldedNorm, drop_affine_part
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.editor import Editor
from rewrite.observe.outcomes import ObservedSite, observed_outcomes
from rewrite.observe.plan import Options
from rewrite.outcomes import Change, Contract, Declined, Site, Skip
from rewrite.protocol import Pass
from rewrite.weights.baking import Baked, bake
from rewrite.weights.tensor_recipe import Exact


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Move the affine map of every norm that algebra allows into its neighbours.

    Rewrites:
      1. BatchNorm in eval mode (modules, subclasses, functional calls): into the convolutions and
         linear layers before it, or into all those behind it; the norm goes.
      2. Norm behind norm: the second is absorbed by the first.
      3. Multiplications and additions by a constant per channel (LayerScale, FrozenBatchNorm2d).
      4. The weight and bias of LayerNorm, GroupNorm and RMSNorm: into all layers that read it
         (convolutions, linear layers, the projections of multi-head attention); the
         norm stays, without them.
      5. Parallel linear branches, as `merge-branches` does; norms of the identity go with them.
      6. Layers whose weight is computed (weight norm, spectral norm, another parametrization)
         become plain layers where they absorb a map.

    Declines: norms in training mode or without running statistics; values that something else
    reads; a shift in front of zero padding; operations that do not commute with a map per channel;
    shared layers where the map is not at every call; hooks; a weight that is not the same at every
    call.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    merge: bool = field(default=True, metadata={"help": "merge parallel linear branches, too"})
    compensate: bool = field(
        default=False,
        metadata={"help": "let other readers of a value absorb the inverse map"},
    )
    unshare: bool = field(
        default=False,
        metadata={"help": "clone a shared layer whose calls are not all normalized alike"},
    )
    leftover: str = field(
        default="norm",
        metadata={"help": "what a norm that cannot be folded becomes: norm (it stays), affine"},
    )
    parametrized: str = field(
        default="bake",
        metadata={"help": "layers whose weight is computed: bake (make them plain), refuse"},
    )
    untie: bool = field(
        default=False,
        metadata={"help": "give a head that shares its weight with the embedding its own"},
    )
    strict_outputs: bool = field(
        default=False,
        metadata={"help": "leave a norm alone whose output another call would return"},
    )
    input_norm: str | None = field(
        default=None,
        metadata={"help": "fold the preprocessing (x - mean) / std, given as MEAN/STD by commas"},
    )

    def __post_init__(self) -> None:
        if self.leftover not in ("norm", "affine"):
            raise OptionError(f"{self.name}: leftover is {self.leftover!r}; pass norm or affine")
        if self.parametrized not in ("bake", "refuse"):
            raise OptionError(
                f"{self.name}: parametrized is {self.parametrized!r}; pass bake or refuse"
            )
        if self.input_norm is not None:
            parse_input_norm(self.input_norm)

    def reference(self, model: nn.Module) -> nn.Module:
        """Return what the rewritten model has to equal: `model`, behind the preprocessing."""
        if self.input_norm is None:
            return model
        return nn.Sequential(InputNorm(*parse_input_norm(self.input_norm)), model)

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every norm and constant in data-flow order; a site's plan says what it does."""
        decided = self._decide(captured, None)
        options = Options(self.untie, self.strict_outputs)
        for outcome in observed_outcomes(captured, decided.outcomes, options, decided.unsure):
            if isinstance(outcome, Site) and not isinstance(outcome.plan, ObservedSite):
                yield replace(outcome, plan=_Planned(outcome.plan, decided))
            else:
                yield outcome

    def _decide(self, captured: Captured, wanted: Set[tuple[str, Node | None]] | None) -> _Decided:
        """Decide about every source, or about those that are wanted (target and node)."""
        bake = self.parametrized == "bake"
        folder = Folder(captured, self.compensate, self.unshare, bake)
        decided = _Decided(folder, Branches(captured, folder.planner))
        if self.input_norm is not None:
            decided.outcomes.append(_fold_input(folder, *parse_input_norm(self.input_norm)))
        merges = [m for m in decided.branches.find() if isinstance(m, Merge)] if self.merge else []
        for source in sources(folder.planner):
            first = source.first[0]
            if wanted is not None and (source.target, first) not in wanted:
                continue
            outcome = folder.decide(source)
            if isinstance(outcome, Fold):
                plan: object = outcome
            elif merge := next((m for m in merges if m.inside.issuperset(source.nodes)), None):
                plan = merge
            elif self.leftover == "affine" and folder.replaceable(source):
                plan = UnfoldedNorm(source, outcome.reason)
            else:
                decided.outcomes.append(Skip(source.target, source.before, outcome.reason))
                if folder.is_unsure(source, outcome):
                    decided.unsure.add(source.target)
                continue
            decided.outcomes.append(Site(source.target, source.before, first, plan))
        for merge in merges:
            if wanted is None or (merge.owner, merge.root) in wanted:
                decided.outcomes.append(Site(merge.owner, merge.before, merge.root, merge))
        return decided

    def _decided(self, captured: Captured, sites: Sequence[Site]) -> _Decided:
        """Return what `find` decided, if all its sites are wanted, and decide anew if not."""
        given = [site.plan.decided for site in sites if isinstance(site.plan, _Planned)]
        wanted = {(site.target, site.node) for site in sites}
        if given:
            found = {(o.target, o.node) for o in given[0].outcomes if isinstance(o, Site)}
            if found == wanted:
                return replace(
                    given[0], outcomes=[o for o in given[0].outcomes if isinstance(o, Site)]
                )
        return self._decide(captured, wanted)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Fold one site."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Fold all sites: each layer's new weight is computed once, from all that it absorbs."""
        observed = [site for site in sites if isinstance(site.plan, ObservedSite)]
        traced = [site for site in sites if not isinstance(site.plan, ObservedSite)]
        changes = self._rewrite_traced(captured, traced) if traced else []
        return [*changes, *(carry_out(captured, s.plan.fold, s.plan.before) for s in observed)]

    def _rewrite_traced(self, captured: Editable, sites: Sequence[Site]) -> list[Change]:
        """Fold the sites that tracing found."""
        decided = self._decided(captured, sites)
        plans = [site for site in decided.outcomes if isinstance(site, Site)]
        for outcome in decided.outcomes:
            if isinstance(outcome, Skip):
                raise PassError(
                    f"{outcome.target}: {outcome.reason}; it could only be folded together with "
                    "a site that is left out: leave it out, too",
                    outcome.target,
                )
        baked = _bake_all(captured, plans)
        ran = _run(captured, plans, baked)
        merged = _merge_all(captured, decided.branches, plans, ran.exact)
        inside = {node for merge in merged for node in merge.inside}
        changes = []
        for site in plans:
            recipe = ran.recipes.get(site)
            if isinstance(site.plan, Fold) and isinstance(recipe, FoldRecipe):
                change = _remove(captured, site.plan, recipe, inside, ran.clones)
                changes.append(_with_baked(change, site.plan, baked))
            elif isinstance(site.plan, UnfoldedNorm) and isinstance(recipe, AffineRecipe):
                change = site.plan.write(ran.store, recipe)
                ran.rename(recipe.name, change.recipe["name"])
                changes.append(change)
            elif isinstance(site.plan, Merge):
                changes.append(_merged_change(site, merged[site.plan]))
        # What float64 does not compute alike was rounded before it was folded.
        rounded = {name for one in baked.values() for name in one.tensors if name not in one.exact}
        captured.keep_exact({n: e for n, e in ran.exact.items() if n not in rounded})
        return changes


@dataclass
class _Decided:
    """The outcomes of one look at a model, and what they were decided with."""

    folder: Folder
    branches: Branches
    outcomes: list[Site | Skip] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class _Planned:
    """The plan of a site as `find` yields it, and the look at the model that it is part of."""

    what: Fold | UnfoldedNorm | Merge
    decided: _Decided


@dataclass
class _Ran:
    """The recipes of the sites that have one, and what running them wrote."""

    recipes: dict[Site, FoldRecipe | AffineRecipe]
    store: ModelStore
    exact: Exact
    clones: tuple[str, ...]

    def rename(self, old: str, new: str) -> None:
        """Note that what was written under one name is called another."""
        for attr in ("weight", "bias"):
            if (exact := self.exact.pop(f"{old}.{attr}", None)) is not None:
                self.exact[f"{new}.{attr}"] = exact


def _run(captured: Editable, plans: Sequence[Site], baked: Mapping[str, Baked]) -> _Ran:
    """Run the recipe of every fold, and of every norm that becomes a multiply-add."""
    known = {name: value for one in baked.values() for name, value in one.unrounded().items()}
    recipes: dict[Site, FoldRecipe | AffineRecipe] = {}
    for site in plans:
        if isinstance(site.plan, Fold):
            made = recipe_of(captured, site.plan)
            # The plan saw what was baked as the model computes it, rounded; the map is made anew.
            recipes[site] = replace(made, planned=None) if known else made
        elif isinstance(site.plan, UnfoldedNorm):
            recipes[site] = site.plan.recipe()
    store = ModelStore(captured, list(recipes.values()))
    # Branches are added up as they were before their norms' folds were rounded.
    asked = captured.exact is not None or any(isinstance(site.plan, Merge) for site in plans)
    exact: Exact | None = {**known} if asked or known else None
    try:
        run_recipes(list(recipes.values()), store, exact)
    except CheckpointError as error:
        raise PassError(f"fold: {error}") from error
    clones = store.finish()
    return _Ran(recipes, store, store.named(exact or {}), clones)


def _bake_all(captured: Editable, plans: Sequence[Site]) -> dict[str, Baked]:
    """Make plain what absorbs a map, or loses its own, and computes its weight."""
    layers = [
        site.plan.source.layer for site in plans if isinstance(site.plan, Fold | UnfoldedNorm)
    ]
    for site in plans:
        if isinstance(site.plan, Fold):
            layers += [edit.layer for m in site.plan.moves for edit in m.absorption.edits]
    modules = [layer.module for layer in layers if layer is not None]
    found = {name: bake(captured, name) for name in dict.fromkeys(modules) if name is not None}
    return {name: baked for name, baked in found.items() if baked is not None}


def _with_baked(change: Change, fold: Fold, baked: Mapping[str, Baked]) -> Change:
    """Return `change` with what was baked for it."""
    names = dict.fromkeys((*fold.layers, fold.source.target))
    made = [baked[name] for name in names if name in baked]
    if not made:
        return change
    plain = {name for one in made for name in one.tensors}
    gone = {old for old, new in change.keys.items() if new is None}
    keys = {old: new for old, new in change.keys.items() if old not in plain}
    for one in made:
        keys |= {old: None if new in gone else new for old, new in one.keys.items()}
    normed = sorted({name for one in made for name in one.normed})
    return replace(
        change, note="; ".join(filter(None, [change.note, *(one.words for one in made)])),
        keys=keys,
        recipe={**change.recipe, "weight_normed": normed},
    )  # fmt: skip


def _merge_all(
    captured: Editable, branches: Branches, plans: Sequence[Site], unrounded: Exact
) -> dict[Merge, Change]:
    """Merge every set of branches that a site asks for, once; norms are folded by then."""
    merged: dict[Merge, Change] = {}
    for site in plans:
        merge = site.plan
        if isinstance(merge, Merge) and merge not in merged:
            again = branches.again(merge)
            merged[merge], exact = merge_site(captured, merge.owner, again, unrounded)
            captured.keep_exact(exact)
    return merged


def _merged_change(site: Site, change: Change) -> Change:
    """Return the change of the branches, or that of a norm which went with them."""
    if site.node is not None and site.plan.root is site.node:
        return change
    into = change.after.removeprefix("one convolution, ")
    return Change(
        site.target, site.before, f"merged into {into}", touched=change.touched,
        recipe={"do": "with", "target": change.target},
    )  # fmt: skip


def _fold_input(folder: Folder, mean: Tensor, std: Tensor) -> Site | Skip:
    """Fold y = (x - mean) / std, which the model's first input used to go through.

    Raises:
        PassError: what reads the input cannot absorb it.
    """
    fold = fold_input(folder, mean, std)
    if isinstance(fold, Declined):
        raise PassError(f"input_norm cannot be folded: {fold.reason}; leave the option out")
    return Site("input", "(x - mean) / std", fold.source.first[0], fold)


def _remove(
    captured: Editable,
    fold: Fold,
    recipe: FoldRecipe,
    merged: Set[Node],
    clones: tuple[str, ...],
) -> Change:
    """Take the folded norm, or its affine part, out of the model."""
    source = fold.source
    keys = {} if recipe.neutral else _keys(captured, source)
    if source.kind == "gain":
        if not recipe.neutral:
            drop_affine_part(captured, source.target)
    elif source.kind != "input" and not merged >= set(source.nodes):
        _bypass(captured, captured.editor, source)
    into = ", ".join(name or "(root)" for name in fold.layers)
    what = "its affine part folded" if source.kind == "gain" else "folded"
    return Change(
        source.target, source.before, f"{what} into {into}" if into else "removed: it did nothing",
        note="; ".join(_notes(fold)),
        touched=(*fold.layers, *clones, *(name.rpartition(".")[0] for name in recipe.neutral)),
        keys=keys, recipe=recipe.to_data(),
    )  # fmt: skip


def _notes(fold: Fold) -> Iterable[str]:
    if fold.keeps:
        yield f"{fold.keeps}: it stays, and does nothing"
    relied = dict.fromkeys(step for move in fold.moves for step in move.absorption.needs_size)
    for step in relied:
        yield f"holds for inputs of this size, for which {step} adds nothing"


def _bypass(captured: Captured, editor: Editor, source: Source) -> None:
    for constant in source.constants:
        editor.bypass(constant.node, constant.operand)
    nodes = () if source.constants else source.nodes
    if nodes:
        in_graphs = [isinstance(captured.module(captured.owner(n)), GraphModule) for n in nodes]
        nodes = nodes if all(in_graphs) else nodes[:1]
    for node in nodes:
        editor.bypass(node)


def _keys(captured: Captured, source: Source) -> dict[str, str | None]:
    """Return the state-dict keys that go with the source."""
    if source.kind == "input":
        return {}
    if source.constants:
        roots = [c.root for c in source.constants if c.root is not None]
        return dict.fromkeys(roots)
    assert source.layer is not None
    refs = (source.layer.weight, source.layer.bias, source.layer.mean, source.layer.var)
    keys: dict[str, str | None] = {ref.name: None for ref in refs if ref is not None}
    module: nn.Module = captured.module(source.target)
    if source.kind == "norm" and "num_batches_tracked" in module._buffers:
        keys[f"{source.target}.num_batches_tracked"] = None
    for alias in captured.aliases(source.target):
        for key in list(keys):
            if key.startswith(f"{source.target}."):
                keys[alias + key.removeprefix(source.target)] = None
    return keys
