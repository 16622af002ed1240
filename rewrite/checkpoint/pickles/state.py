"""Find and build the state dict in a parsed checkpoint; everything else stays inert.

    checkpoint = {"state_dict": {...}, "optimizer": ..., "epoch": 3, "args": ...}
    state dict = the mapping from names to tensors

A whole module that cannot be opened (DistributedDataParallel, a class that nobody listed) has a
state dict too: its parameters and persistent buffers, read off the tree of its states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rewrite.checkpoint.pickles.opcodes import DictOf, ListOf, Made, Name, Node, TupleOf
from rewrite.checkpoint.pickles.tensors import is_tensor
from rewrite.checkpoint.pickles.unpickle import PickleFile
from rewrite.checkpoint.prefixes import WithVersions
from rewrite.errors import CheckpointError

NESTED = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params"),
    *("model_ema", "ema", "state_dict_ema", "ema_state_dict", "params_ema"),
)
"""Where training checkpoints keep their state dict; the first that is there is taken."""

_DEEPEST = 200


def pairs_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Return the items of a dict of the pickle, None for anything else."""
    if isinstance(node, DictOf):
        return node.pairs
    if isinstance(node, Made) and node.name.startswith(("collections.", "omegaconf.")):
        first = node.args.items[0] if isinstance(node.args, TupleOf) and node.args.items else None
        given = [
            item.items for item in (first.items if isinstance(first, ListOf) else ())
            if isinstance(item, ListOf | TupleOf) and len(item.items) == 2
        ]  # fmt: skip
        return [(key, value) for key, value in given] + node.pairs
    return None


def is_module(node: Any) -> bool:
    """Say whether a node of the pickle is a module: something with parameters and children."""
    return isinstance(node, Made) and _state_of(node) is not None


def find_state(root: Any, key: str | None = None) -> tuple[str, Any] | None:
    """Return where the state dict of a checkpoint is, and its node; None where there is none.

    Raises:
        CheckpointError: there are several, or none is called `key`.
    """
    if key is not None:
        node = _at(root, key)
        found = _search(node, key) if node is not None else None
        if found is None:
            known = ", ".join(place for place, _ in _all_states(root, "")) or "none"
            raise CheckpointError(f"has no state dict called {key}; those in it: {known}")
        return found
    found = _search(root, "")
    if found is not None:
        return found
    others = list(_all_states(root, ""))
    if len(others) > 1:
        names = ", ".join(place for place, _ in others)
        raise CheckpointError(f"holds several state dicts ({names}); choose one with --key NAME")
    return others[0] if others else None


def _at(root: Any, key: str) -> Any:
    """Return the node under a key, or under keys with dots between them."""
    pairs = {str(name): value for name, value in pairs_of(root) or ()}
    if key in pairs:
        return pairs[key]
    first, _, rest = key.partition(".")
    return _at(pairs[first], rest) if rest and first in pairs else None


def _search(node: Any, place: str, depth: int = 0) -> tuple[str, Any] | None:
    """Return the state dict, or the module, that a node is or nests under a usual name."""
    if is_module(node) or _is_state(node):
        return place, node
    pairs = {str(key): value for key, value in pairs_of(node) or ()}
    for key in NESTED if depth < 4 else ():
        if key not in pairs:
            continue
        found = _search(pairs[key], f"{place}.{key}".strip("."), depth + 1)
        if found is not None:
            return found
    return None


def _is_state(node: Any) -> bool:
    pairs = pairs_of(node)
    return bool(pairs) and all(isinstance(k, str) and is_tensor(v) for k, v in pairs or ())


def _all_states(node: Any, place: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every state dict and module below a node, but for those of optimizers."""
    if place and (is_module(node) or _is_state(node)):
        yield place, node
        return
    for key, value in pairs_of(node) or () if depth < 4 else ():
        if isinstance(key, str) and not key.startswith("optim"):
            yield from _all_states(value, f"{place}.{key}".strip("."), depth + 1)


def build_state(file: PickleFile, node: Any, device: str | torch.device) -> WithVersions:
    """Return the tensors of a state dict or of a module by their keys."""
    entries = dict(_module_entries(node)) if is_module(node) else dict(pairs_of(node) or ())
    wanted = {key: value for key, value in entries.items() if is_tensor(value)}
    tensors = file.build(TupleOf(tuple(wanted.values())), map_location=device)
    return WithVersions(dict(zip(wanted, tensors, strict=True)), _versions(node))


def _versions(node: Any) -> dict[str, dict[str, int]]:
    """Return the `_metadata` of a state dict, as far as it is names and numbers."""
    found: dict[str, dict[str, int]] = {}
    for state in node.states if isinstance(node, Made) else ():
        for key, value in pairs_of(state) or ():
            if key != "_metadata":
                continue
            for place, entries in pairs_of(value) or ():
                numbers = {k: v for k, v in pairs_of(entries) or () if type(v) is int}
                if isinstance(place, str):
                    found[place] = numbers
    return found


def left_out(root: Any, place: str) -> tuple[str, ...]:
    """Return the entries of a checkpoint beside its state dict, each with what it is."""
    first = place.partition(".")[0]
    return tuple(
        f"{key} ({describe_node(value)})"
        for key, value in (pairs_of(root) or ())
        if isinstance(key, str) and place and key != first
    )


def describe_node(node: Any) -> str:
    """Say in a word or two what a node of the pickle is."""
    if not isinstance(node, Node):
        return type(node).__name__
    if isinstance(node, Made):
        return "tensor" if is_tensor(node) else node.name.rpartition(".")[2] or "object"
    if isinstance(node, Name):
        return node.full
    return {"ListOf": "list", "TupleOf": "tuple", "DictOf": "dict"}.get(
        type(node).__name__, "object"
    )


def _state_of(node: Made) -> dict[str, Any] | None:
    """Return the attributes of a module, None for what is no module."""
    for state in node.states:
        found = {str(key): value for key, value in pairs_of(state) or ()}
        if "_modules" not in found and "state" in found:
            found = {str(key): value for key, value in pairs_of(found["state"]) or ()}
        if "_modules" in found and "_parameters" in found:
            return found
    return None


def _module_entries(root: Made) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and persistent buffers of a module by their keys."""
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    count = 0
    while waiting:
        prefix, node, depth = waiting.pop()
        held = _state_of(node) if isinstance(node, Made) else None
        if held is None:
            continue
        count += 1
        if depth > _DEEPEST or count > 100_000:
            raise CheckpointError("holds modules that are nested too deep")
        left = _texts(held.get("_non_persistent_buffers_set"))
        for kind in ("_parameters", "_buffers"):
            for key, value in pairs_of(held.get(kind)) or ():
                if not (kind == "_buffers" and key in left):
                    yield f"{prefix}{key}", value
        children = pairs_of(held["_modules"]) or []
        waiting += [(f"{prefix}{key}.", child, depth + 1) for key, child in reversed(children)]


def _texts(node: Any) -> set[str]:
    """Return the texts of a set of the pickle."""
    if isinstance(node, Made) and isinstance(node.args, TupleOf) and node.args.items:
        node = node.args.items[0]
    items: Sequence[Any] = node.items if isinstance(node, ListOf | TupleOf) else ()
    return {item for item in items if isinstance(item, str)}
