"""The tensors of whatever a model takes or returns, each with its path."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

ROOT = "output"


def leaves(value: Any, path: str = ROOT) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts, dataclasses, tuples, lists and objects, with its path."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        value = list(value.unbind())
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=True):
            yield from leaves(item, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif _is_plain_object(value):
        for name, item in vars(value).items():
            yield from leaves(item, f"{path}.{name}")
    else:
        yield path, value


_DEPTH = 4
"""How deep an object may hold the tensors that it carries: objects may point at each other."""


def _is_plain_object(value: Any, depth: int = _DEPTH) -> bool:
    """Return whether `value` is an object that merely carries tensors: an image list, a cache."""
    if isinstance(value, torch.Tensor | torch.nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    return depth > 0 and any(_carries(item, depth - 1) for item in vars(value).values())


def _carries(item: Any, depth: int) -> bool:
    """Return whether `item` is a tensor, or holds some as a list, a dict or an object does."""
    if isinstance(item, Mapping):
        return any(_carries(part, depth) for part in item.values())
    if isinstance(item, list | tuple):
        return any(_carries(part, depth) for part in item)
    return isinstance(item, torch.Tensor) or _is_plain_object(item, depth)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return `value` with `function` applied to every leaf of nested containers.

    An object that carries tensors (a cache) is copied, with each of its tensors replaced.
    """

    def one(leaf: Any) -> Any:
        if not _is_plain_object(leaf):
            return function(leaf)
        return copy.deepcopy(leaf, {id(tensor): function(tensor) for tensor in tensors(leaf)})

    return tree_map(one, value)


def carries_objects(value: Any) -> bool:
    """Return whether objects that no container of Python's own are in `value`: a cache."""
    known = torch.Tensor | int | float | bool | str | None
    return not all(isinstance(leaf, known) for leaf in tree_leaves(value))


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors among the leaves of `value`."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
