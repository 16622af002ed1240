"""Where in an object, or at which places of a tuple, code holds a value.

Output(first=h, second=y)    {"first"}          (h, y)    {"0"}
tuple(h), (h,) + rest        anywhere           f(h)      what f says; else it may be h itself
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence, Set

ANYWHERE = "*"

FORM = frozenset(
    {"size", "dim", "numel", "stride", "is_contiguous", "element_size", "get_device", "type",
     "shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "ndimension",
     "is_floating_point"}
)  # fmt: skip
HARMLESS = frozenset(
    {"isinstance", "len", "type", "id", "print", "hasattr", "getattr", "callable", "repr", "str"}
)
COLLECTS = frozenset({"tuple", "list", "dict", "zip", "enumerate", "reversed", "iter", "next"})
KEEPS = frozenset({"append", "extend", "add", "insert", "update", "setdefault"})
TALKS = frozenset({"logger", "warnings", "logging"})

Fields = frozenset[str] | None
"""The names of fields, the numbers of places; with `ANYWHERE`: anywhere in a collection.

None: it may be the value itself.
"""


class UnobservedLine(Exception):  # noqa: N818 - a reason, caught where it is decided
    """A line that no observed call took reads the value, or calls a reader of it."""


def excludes(fields: Fields, key: str) -> bool:
    """Return whether what stands under a name, or at a place, is not the value."""
    if fields is None or ANYWHERE in fields or key in fields:
        return False
    return all(field.isdigit() == key.isdigit() for field in fields)


def joined(parts: Sequence[Fields]) -> Fields:
    """Return the fields of several objects together."""
    known = [part for part in parts if part is not None]
    return frozenset().union(*known) if len(known) == len(parts) else None


def merged(
    branches: Sequence[tuple[Set[str], Mapping[str, Fields]]],
) -> dict[str, Fields]:
    """Return the fields of each name behind a fork.

    Args:
        branches: per branch, the names that hold the value, and the fields of names.
    """
    held = set().union(*(names for names, _ in branches))
    return {
        name: joined([fields.get(name) for names, fields in branches if name in names])
        for name in held
    }


def fields_of_dict(node: ast.Dict, may: Callable[[ast.expr], bool]) -> Fields:
    """Return under which keys a display of a dictionary holds the value, if all keys are texts."""
    if not all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in node.keys):
        return frozenset({ANYWHERE})
    held = [key for key, value in zip(node.keys, node.values, strict=True) if may(value)]
    return frozenset(str(key.value) for key in held if isinstance(key, ast.Constant))


def spread(fields: Fields) -> dict[str | None, bool]:
    """Return the arguments that hold the value where an object of known fields is spread."""
    return {} if fields is None or ANYWHERE in fields else dict.fromkeys(fields, True)
