"""Run recipes on tensors by name: the one executor of a fold, in memory and on a checkpoint.

    1. every map is made of the old tensors, checked against what its plan relies on, and entered
       in the ledger of the layers that absorb it
    2. each layer's new tensors are computed in float64 from all of them, and rounded once
    3. branches are added up, with the norms that were folded into them
    4. tensors that read a norm in observed calls absorb its map, as they are by then, those of a
       stream are put through one, and recipes of single tensors are run

Only short vectors are kept between the steps; a weight is read, computed and written by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine, dirac, embed
from rewrite.affine.layers import Layer
from rewrite.affine.ledger import Ledger
from rewrite.errors import CheckpointError
from rewrite.fold.recipes import AffineRecipe, FoldRecipe, MergeRecipe, Recipe, TermRecipe
from rewrite.fold.requirements import Requirements, culprit, narrowest
from rewrite.graph.captured import TensorRef
from rewrite.observe.recipe import ReaderRecipe
from rewrite.observe.stream_recipe import StreamRecipe
from rewrite.weights.tensor_recipe import (
    Exact,
    FileStore,
    ScalingOf,
    TensorRecipe,
    TensorStore,
)


def run_recipes(recipes: Sequence[Recipe], store: TensorStore, exact: Exact | None = None) -> None:
    """Run `recipes` in their order on the tensors of `store`.

    Args:
        recipes: those of one fold.
        store: what is read and written.
        exact: what tensors that were written before are, and is told what each written tensor is
            before it is rounded, if given. The old tensors live as long as it does.

    Raises:
        CheckpointError: a tensor is missing, or the tensors break what the plan relied on.
    """
    ledger = Ledger(lambda ref: store.get(ref.name), exact)
    aliases: dict[str, tuple[str, ...]] = {}
    for recipe in recipes:
        if isinstance(recipe, FoldRecipe):
            _enter(recipe, ledger, store)
            aliases |= recipe.aliases
    merges = [recipe for recipe in recipes if isinstance(recipe, MergeRecipe)]
    merged_names = {name for recipe in merges for name in recipe.reads()}
    unrounded: Exact = dict(exact or {})
    for recipe in recipes:
        if isinstance(recipe, AffineRecipe):
            unrounded |= _write_affine(recipe, ledger, store)
    # Who asks for exact values later has to find the old tensors; else they are freed here.
    kept = exact is not None or bool(merges)
    for layer in ledger.layers() if kept else _largest_first(ledger.layers(), store):
        own = ledger.alone(layer) if kept else ledger
        weight = _Sum()
        for attr, tensor in own.new_tensors(layer, weight).items():
            total = weight.total if attr == "weight" else None
            for name in names_of(layer, attr, aliases.get(layer.name, ())):
                set_finite(store, name, tensor, total)
                if exact is not None or name in merged_names:
                    unrounded[name] = _promise(own, layer, attr)
    for recipe in recipes:
        for name, value in recipe.neutral.items() if isinstance(recipe, FoldRecipe) else ():
            old = store.get(name)
            store.set(name, torch.full_like(old, value))
            unrounded[name] = partial(torch.full, old.shape, value, dtype=torch.float64)
        for name in recipe.gone if isinstance(recipe, FoldRecipe) else ():
            store.delete(name)
    for recipe in merges:
        unrounded |= run_merge(recipe, store, unrounded)
    if exact is not None:
        exact |= unrounded
    written = unrounded if exact is None else exact
    for recipe in recipes:
        if isinstance(recipe, ReaderRecipe):
            _run_reader(recipe, store, written)
        elif isinstance(recipe, StreamRecipe):
            recipe.check(store.get)
            recipe.put_through(_finite(store), written)
        elif isinstance(recipe, TensorRecipe):
            recipe.run(_finite(store, counters=True), written)


def _largest_first(layers: Sequence[Layer], store: TensorStore) -> list[Layer]:
    """Return the layers in an order in which each new weight fits where an old one was freed.

    Calls of functions come last, in their order: a new bias of theirs is named by it.
    """

    def size(layer: Layer) -> int:
        if layer.module is None or layer.weight is None:
            return 0
        return store.get(layer.weight.name).numel()

    return sorted(layers, key=size, reverse=True)


def names_of(layer: Layer, attr: str, aliases: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of a layer's weight or bias, under which a store is given it.

    A layer at one call of several, and the new bias of a function call, have a key and no name.
    """
    ref = {"weight": layer.weight, "bias": layer.bias}[attr]
    if layer.call is not None or (ref is None and layer.module is None):
        return (f"{layer.key}:{attr}",)
    ref = ref or TensorRef(str(layer.module), attr)
    return (ref.name, *(TensorRef(alias, ref.attr).name for alias in aliases))


def _enter(recipe: FoldRecipe, ledger: Ledger, store: TensorStore) -> None:
    origin = recipe.origin
    dtype = torch.float64
    if recipe.requirements.invertible:
        dtype = narrowest(recipe.layers(), lambda ref: store.get(ref.name))
    if recipe.planned is not None:
        affine = recipe.planned
    elif isinstance(origin, Layer):
        affine = ledger.affine(origin)
    elif isinstance(origin, Affine):
        affine = origin
    else:
        affine = _chain([link.value(store.get) for link in origin])

    def why() -> str:
        return culprit(origin, lambda ref: store.get(ref.name)) if isinstance(origin, Layer) else ""

    if not affine.scale.is_meta:
        _check(recipe.target, recipe.requirements, affine, dtype, why)
    if isinstance(origin, Layer):
        ledger.forget(origin)
    for move in recipe.moves:
        move.enter(ledger, affine)


def _run_reader(recipe: ReaderRecipe, store: TensorStore, unrounded: Exact) -> None:
    affine = recipe.affine(store.get)

    def why() -> str:
        for name in filter(None, (recipe.weight, recipe.bias)):
            if not bool(torch.isfinite(store.get(name)).all()):
                return f"{name} holds values that are not finite"
        return f"{recipe.bias} is not zero" if affine.shift.any() else ""

    if not affine.scale.is_meta:
        dtype = store.get(recipe.weight).dtype
        _check(recipe.target, Requirements(adds=recipe.adds), affine, dtype, why)
    recipe.absorb(affine, _finite(store), unrounded)


def _check(
    target: str,
    requirements: Requirements,
    affine: Affine,
    dtype: torch.dtype,
    why: Callable[[], str],
) -> None:
    """Raise `CheckpointError` if a map breaks what its plan relied on; `why` says which tensor."""
    if broken := requirements.broken_by(affine, dtype):
        tensor = why()
        raise CheckpointError(
            f"{target}: this checkpoint's {broken}{f' ({tensor})' if tensor else ''}; convert the "
            "model instead"
        )


def _chain(links: Sequence[Affine]) -> Affine:
    result = links[0]
    for affine in links[1:]:
        result = affine.after(result)
    return result


def _write_affine(recipe: AffineRecipe, ledger: Ledger, store: TensorStore) -> Exact:
    layer = recipe.layer
    affine = ledger.affine(layer)
    ledger.forget(layer)
    dtype = narrowest([layer], lambda ref: store.get(ref.name))
    exact = {"weight": affine.scale, "bias": affine.shift}
    for attr, tensor in exact.items():
        set_finite(store, f"{recipe.name}.{attr}", tensor.to(dtype))
    return {f"{recipe.name}.{attr}": (lambda t=t: t) for attr, t in exact.items()}  # type: ignore[misc]  # mypy infers no type of a lambda with a default


def _promise(ledger: Ledger, layer: Layer, attr: str) -> Callable[[], Tensor]:
    return lambda: ledger.exact(layer, attr)


def run_merge(recipe: MergeRecipe, store: TensorStore, unrounded: Exact) -> Exact:
    """Write weight and bias of merged branches, under the name of the recipe.

    `unrounded` holds what folds have written before: branches are added up as they were before
    they were rounded, and their sum is rounded once. Returned is the same of the sum.
    """
    like = store.get(recipe.like)
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name in unrounded:
            return unrounded[name]()
        if name not in held:
            held[name] = store.get(name)
        return held[name]

    kernel, bias = merged(recipe, like, read)
    set_finite(store, f"{recipe.name}.weight", torch.empty_like(like).copy_(kernel))
    set_finite(store, f"{recipe.name}.bias", bias.to(like.dtype))
    return {
        f"{recipe.name}.weight": lambda: merged(recipe, like, read)[0],
        f"{recipe.name}.bias": lambda: merged(recipe, like, read)[1],
    }


def merged(
    recipe: MergeRecipe, like: Tensor, read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one convolution that merged branches are, in float64."""
    channels, taps, device = like.shape[0], like.shape[2:], like.device
    kernel = torch.zeros(like.shape, dtype=torch.float64, device=device)
    bias = torch.zeros(channels, dtype=torch.float64, device=device)
    column = (-1, *(1,) * (like.dim() - 1))
    for term in recipe.terms:
        affine = Affine.identity(channels).to(device)
        for link in term.links:
            if link.data["is"] == "negative":
                affine = Affine(-affine.scale, -affine.shift)
            else:
                affine = link.value(read).to(device).after(affine)
        if term.weight is None:
            part = dirac(channels, recipe.groups, taps, term.at).to(device)
        else:
            part = embed(read(term.weight).detach().double(), taps, term.at)
            if (held := _bias(term, read)) is not None:
                bias += affine.scale * held.detach().double()
        kernel += affine.scale.view(column) * part
        bias += affine.shift
    return kernel, bias


def _bias(term: TermRecipe, read: Callable[[str], Tensor]) -> Tensor | None:
    if term.bias is None:
        return None
    try:
        return read(term.bias)
    except CheckpointError:
        if term.may_lack_bias:
            return None
        raise


@dataclass(frozen=True)
class _Finite:
    """A store that takes finite tensors only.

    Attributes:
        store: where they go.
        counters: whether it takes integers, too: what a recipe multiplies would be rounded in them.
    """

    store: TensorStore
    counters: bool = False

    def get(self, name: str) -> Tensor:
        return self.store.get(name)

    def set(self, name: str, tensor: Tensor) -> None:
        if self.counters and not tensor.is_floating_point():
            self.store.set(name, tensor)
        else:
            set_finite(self.store, name, tensor)

    def delete(self, name: str) -> None:
        self.store.delete(name)


@dataclass(frozen=True)
class _FiniteFiles(_Finite):
    """The same of tensors in files, which check themselves what they write of a product."""

    store: FileStore

    def dtype(self, name: str) -> torch.dtype:
        return self.store.dtype(name)

    def scale(self, source: str, names: Sequence[str], scaling: ScalingOf) -> bool:
        return self.store.scale(source, names, scaling)


def _finite(store: TensorStore, *, counters: bool = False) -> TensorStore:
    if isinstance(store, FileStore):
        return _FiniteFiles(store, counters)
    return _Finite(store, counters)


class _Sum:
    """The sum of the blocks that it is shown; None of no block."""

    total: float | None = None

    def __call__(self, block: Tensor) -> None:
        if not block.is_meta:
            self.total = (self.total or 0.0) + float(block.sum(dtype=torch.float32))


def set_finite(store: TensorStore, name: str, tensor: Tensor, total: float | None = None) -> None:
    """Set a tensor.

    Args:
        store: where it goes.
        name: its name.
        tensor: its values.
        total: their sum, if somebody has added them up already.

    Raises:
        CheckpointError: it holds NaN or infinity in its dtype, or its dtype is none of numbers with
            a fraction.
    """
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is stored in {tensor.dtype}, which would round its weights")
    check_finite(name, tensor, total)
    store.set(name, tensor)


def check_finite(name: str, tensor: Tensor, total: float | None = None) -> None:
    """Raise where a tensor holds a value that is not finite.

    Args:
        name: its name, for the message.
        tensor: its values.
        total: their sum, if somebody has added them up already.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    # The sum reads the tensor once; if it is finite, so is every value. float16 ends at 65504;
    # the sums of other types are fastest in their own, where torch adds in float32.
    if tensor.is_meta:
        return
    wide = torch.float32 if tensor.dtype == torch.float16 else None
    if math.isfinite(tensor.sum(dtype=wide) if total is None else total):
        return
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name} would hold values that are not finite in {tensor.dtype}")
