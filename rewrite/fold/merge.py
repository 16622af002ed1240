"""One sum of parallel branches rewritten as one convolution."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import Node

from rewrite.fold.merged_kernel import Merge, merged_kernel
from rewrite.fold.recipes import merge_recipe
from rewrite.graph.captured import Captured
from rewrite.graph.spellings import function_name
from rewrite.outcomes import Change

_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


_CHECKS = frozenset({"getattr", "eq", "_assert", "dim", "size"})
"""What a norm's forward asks of its input beside normalizing it."""


def merge_site(captured: Captured, target: str, merge: Merge) -> Change:
    """Put one convolution in place of the branches of `merge`."""
    conv = _convolution(captured, merge)
    name = captured.editor.merge(merge.root, _source_of_line, conv, "merged_conv")
    recipe = merge_recipe(captured, merge, name)
    gone = _gone(captured, merge)
    for child in gone:
        captured.editor.remove(child)
    keys = {f"{child}.{key}": None for child in gone for key in captured.module(child).state_dict()}
    touched = (merge.owner, name, *gone)
    return Change(
        target, merge.before, f"one convolution, {name}", touched=touched, keys=keys, recipe=recipe
    )


def _convolution(captured: Captured, merge: Merge) -> nn.Module:
    outer = merge.outer
    weight = captured.tensor(outer.weight)
    kernel, bias = merged_kernel(captured, merge)
    conv = _CONVS[outer.dims](
        weight.shape[1] * outer.groups, weight.shape[0], tuple(weight.shape[2:]), outer.stride,
        outer.padding, outer.dilation, outer.groups, padding_mode=outer.padding_mode,
        device="meta",
    )  # fmt: skip
    new = torch.empty_like(weight).copy_(kernel)
    conv.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    return conv


def _source_of_line(line: Node) -> Node | None:
    """Return the value through which every way to `line` goes, in the forward of its owner."""
    order = {node: place for place, node in enumerate(line.graph.nodes)}
    waiting = {n for n in line.all_input_nodes if not _is_constant(n)}
    while len(waiting) > 1:
        latest = max(waiting, key=order.__getitem__)
        waiting.discard(latest)
        inputs = [n for n in latest.all_input_nodes if not _is_constant(n)]
        if not inputs or function_name(latest) == "getitem":
            return None
        waiting.update(inputs)
    return waiting.pop() if waiting else None


def _is_constant(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op != "placeholder" and all(map(_is_constant, inputs)) and node.op != "call_module"


def _gone(captured: Captured, merge: Merge) -> list[str]:
    """Return the topmost modules all of whose calls lie inside the branches."""
    inside: dict[str, bool] = {}
    for node in captured.nodes():
        if node.op == "get_attr" or function_name(node) in _CHECKS:
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
    ]  # fmt: skip
    whole = set(candidates)
    return [n for n in candidates if not any(p in whole for p in _parents(n))]


def _is_within(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _parents(name: str) -> Iterable[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
