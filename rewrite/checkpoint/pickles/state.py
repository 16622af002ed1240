"""Build the state dict of a parsed checkpoint; everything else stays inert.

    tensor of a key = its node, built alone

A whole module that cannot be opened (DistributedDataParallel, a class that nobody listed) has a
state dict too: its parameters and persistent buffers, read off the tree of its states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rewrite.checkpoint.pickles.unpickle import PickleFile
from rewrite.checkpoint.prefixes import WithVersions
from rewrite.checkpoint.vetting.opcodes import ListOf, Made, TupleOf
from rewrite.checkpoint.vetting.state import is_array, is_module, is_tensor, pairs_of, state_of
from rewrite.errors import CheckpointError

_DEEPEST = 200


def build_state(file: PickleFile, node: Any, device: str | torch.device) -> WithVersions:
    """Return the tensors of a state dict or of a module by their keys."""
    entries = dict(_module_entries(node)) if is_module(node) else dict(pairs_of(node) or ())
    wanted = {k: value for k, value in entries.items() if is_tensor(value) or is_array(value)}
    built = file.build(TupleOf(tuple(wanted.values())), map_location=device)
    tensors = [_as_tensor(file, key, value) for key, value in zip(wanted, built, strict=True)]
    return WithVersions(dict(zip(wanted, tensors, strict=True)), _versions(node))


def _as_tensor(file: PickleFile, key: str, value: Any) -> Any:
    """Return a tensor as it is, and an array of numbers as a tensor of its own."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(value.copy())
    except TypeError as error:
        raise CheckpointError(f"{file.path}: {key} is an array of {value.dtype}") from error


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


def _module_entries(root: Made) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and persistent buffers of a module by their keys."""
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    count = 0
    while waiting:
        prefix, node, depth = waiting.pop()
        held = state_of(node) if isinstance(node, Made) else None
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
