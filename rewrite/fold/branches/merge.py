"""One sum of parallel branches rewritten as one convolution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import Node

from rewrite.fold.branches.kernel import Merge, place_of
from rewrite.fold.executor import run_merge
from rewrite.fold.recipes import MergeRecipe, TermRecipe
from rewrite.fold.store import ModelStore
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.spellings import function_name, is_getitem
from rewrite.graph.traits import Trait, has, named
from rewrite.outcomes import Change
from rewrite.weights.tensor_recipe import Exact

_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


_CHECKS = frozenset({"eq", "_assert"})
"""What a norm's forward does with what it asks of its input, beside normalizing it."""


def merge_site(
    captured: Editable, target: str, merge: Merge, unrounded: Exact
) -> tuple[Change, Exact]:
    """Put one convolution in place of the branches of `merge`.

    Args:
        captured: the model.
        target: the name to report.
        merge: the branches.
        unrounded: what tensors that folds have written are before they are rounded.

    Returns:
        The change, and what the new tensors are before they are rounded.
    """
    recipe = _recipe(captured, merge)
    store = ModelStore(captured, [recipe])
    exact = run_merge(recipe, store, unrounded)
    conv = _convolution(captured, merge, *store.beside.values())
    name = captured.editor.merge(merge.root, _source_of_line, conv, recipe.name)
    recipe = replace(recipe, name=name)
    gone = _gone(captured, merge)
    for child in gone:
        captured.editor.remove(child)
    keys = {f"{child}.{key}": None for child in gone for key in captured.module(child).state_dict()}
    touched = (merge.owner, name, *gone)
    change = Change(
        target, merge.before, f"one convolution, {name}", touched=touched, keys=keys,
        recipe=recipe.to_data(),
    )  # fmt: skip
    values = zip(("weight", "bias"), exact.values(), strict=True)
    return change, {f"{name}.{attr}": value for attr, value in values}


def _recipe(captured: Captured, merge: Merge) -> MergeRecipe:
    terms = tuple(
        TermRecipe(
            None if term.conv is None else term.conv.weight.name,
            None if term.conv is None or term.conv.bias is None else term.conv.bias.name,
            place_of(captured, term, merge.outer),
            term.links,
        )
        for term in merge.terms
    )
    outer = merge.outer
    return MergeRecipe(merge.owner, "merged_conv", outer.weight.name, outer.groups, terms)


def _convolution(captured: Editable, merge: Merge, weight: Tensor, bias: Tensor) -> nn.Module:
    outer = merge.outer
    old = captured.tensor(outer.weight)
    conv = _CONVS[outer.dims](
        old.shape[1] * outer.groups, old.shape[0], tuple(old.shape[2:]), outer.stride,
        outer.padding, outer.dilation, outer.groups, padding_mode=outer.padding_mode,
        device="meta",
    )  # fmt: skip
    for key, value in (("weight", weight), ("bias", bias)):
        captured.editor.write(conv, key, value, old.requires_grad)
    return conv


def _source_of_line(line: Node) -> Node | None:
    """Return the value through which every way to `line` goes, in the forward of its owner."""
    order = {node: place for place, node in enumerate(line.graph.nodes)}
    waiting = {n for n in line.all_input_nodes if not _is_constant(n)}
    while len(waiting) > 1:
        latest = max(waiting, key=order.__getitem__)
        waiting.discard(latest)
        inputs = [n for n in latest.all_input_nodes if not _is_constant(n)]
        if not inputs or is_getitem(latest):
            return None
        waiting.update(inputs)
    return waiting.pop() if waiting else None


def _is_constant(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op != "placeholder" and all(map(_is_constant, inputs)) and node.op != "call_module"


def _gone(captured: Captured, merge: Merge) -> list[str]:
    """Return the topmost modules that nothing outside of the branches calls or reads.

    One whose weight is read elsewhere, or of which code asks something, stays where it is.
    """
    inside: dict[str, bool] = {}
    read: list[str] = []
    for node in captured.nodes():
        if node.op == "get_attr":
            if any(user not in merge.inside for user in node.users):
                read.append(str(node.target))
            continue
        if _asks(node):
            continue
        names = [captured.owner(node)]
        if node.op == "call_module":
            names.append(str(node.target))
        for name in names:
            while name:
                inside[name] = inside.get(name, True) and node in merge.inside
                name = name.rpartition(".")[0]
    candidates = [
        name for name, only in inside.items()
        if only and not _is_within(merge.owner, name) and captured.unknown_caller(name) is None
        and captured.code.exchanged(name) is None and not any(_is_within(r, name) for r in read)
    ]  # fmt: skip
    whole = set(candidates)
    return [n for n in candidates if not any(p in whole for p in _parents(n))]


def _is_within(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _parents(name: str) -> Iterable[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _asks(node: Node) -> bool:
    return has(node, Trait.ASKS) or named(node, "getattr") or function_name(node) in _CHECKS
