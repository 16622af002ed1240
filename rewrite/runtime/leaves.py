"""The tensors of whatever a model takes or returns, each with its path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

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


def _is_plain_object(value: Any) -> bool:
    """Return whether `value` is an object that merely carries tensors (torchvision's ImageList)."""
    if isinstance(value, torch.Tensor | torch.nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    return any(isinstance(item, torch.Tensor) for item in vars(value).values())


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors among the leaves of `value`."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
