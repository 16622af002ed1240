"""Sort modules by the order in which data flows through them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rewrite.graph.captured import Captured
from rewrite.graph.captured import Region as Region


def in_data_flow_order(captured: Captured) -> list[tuple[str, nn.Module]]:
    """Return every module by its first name, in the order of first calls, uncalled ones last.

    A module whose forward was traced stands before what it calls. What only an opaque module calls
    (the projection inside attention) stands right behind it, in the order of registration.
    """
    first = {"": 0}
    for name in _run(captured):
        first.setdefault(name, len(first))
    modules = list(captured.tree.modules())
    return sorted(modules, key=lambda item: first.get(item[0], len(first)))


def _run(captured: Captured) -> Iterator[str]:
    """Yield the modules that run, by their first names, each at least once.

    What an opaque module calls has regions of its own, at the end of a capture; here they follow
    the call of that module. Roots that no traced call leads to come after all others.
    """
    waiting = dict.fromkeys(captured.regions)
    below: dict[str, list[Region]] = {}
    for region in captured.regions:
        for name in _around(region.name):
            below.setdefault(name, []).append(region)
    while waiting:
        pending = [_names(captured, next(iter(waiting)), waiting)]
        while pending:
            module = next(pending[-1], None)
            if module is None:
                pending.pop()
                continue
            yield module
            inner = [region for region in below.get(module, ()) if region in waiting]
            pending += [_names(captured, region, waiting) for region in reversed(inner)]


def _names(captured: Captured, region: Region, waiting: dict[Region, None]) -> Iterator[str]:
    """Yield the modules whose forward a region goes through, or calls, as it does."""
    if region not in waiting:
        return
    del waiting[region]
    tree = captured.tree
    for node in region.graph.nodes:
        owner = region.frames[node].owner
        if owner in region.entered:
            yield from reversed([*_around(owner)])
        if node.op == "call_module":
            yield tree.name(captured.module(str(node.target)))


def _around(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it, innermost first, without ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
