"""Validate the JSON of an exported program against PyTorch's schema before using it.

    value : type      dataclass = those keys and no others, union = exactly one of its keys
    size  : text      numbers, symbols (s0, u3) and arithmetic that is never evaluated

The schema is `torch._export.serde.schema`, whose classes are read for their fields and never made.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from functools import cache
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from rewrite.checkpoint.vetting.sizes import check_size
from rewrite.errors import CheckpointError

_DEEPEST = 60
_FLOATS = frozenset({"Infinity", "-Infinity", "NaN"})


def parse_json(data: bytes, kind: type) -> dict[str, Any]:
    """Return the JSON object of a member if it is what `kind` of the schema says.

    Raises:
        CheckpointError: it is not; with the place in it.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("holds JSON that cannot be read") from error
    check(content, kind, kind.__name__)
    return content  # type: ignore[no-any-return]  # checked one line above


def check(value: Any, kind: Any, place: str, depth: int = 0) -> None:
    """Raise CheckpointError unless `value` is what a type of the schema says."""
    if depth > _DEEPEST:
        raise CheckpointError(f"holds JSON that is nested too deep ({place})")
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        check(value, typing.get_args(kind)[0], place, depth)
    elif origin in (typing.Union, types.UnionType):
        options = [item for item in typing.get_args(kind) if item is not type(None)]
        if value is not None:
            check(value, options[0], place, depth)
    elif origin is list:
        _expect(value, list, place)
        for index, item in enumerate(value):
            check(item, typing.get_args(kind)[0], f"{place}[{index}]", depth + 1)
    elif origin is dict:
        _expect(value, dict, place)
        for key, item in value.items():
            check(item, typing.get_args(kind)[1], f"{place}.{key}", depth + 1)
    elif dataclasses.is_dataclass(kind):
        _check_fields(value, typing.cast(type, kind), place, depth)
    else:
        _check_plain(value, kind, place)


def _check_fields(value: Any, kind: Any, place: str, depth: int) -> None:
    _expect(value, dict, place)
    fields = _fields(kind)
    for key in value:
        if key not in fields:
            raise CheckpointError(f"holds {place}.{key}, which this version of PyTorch has not")
    if issubclass(kind, _Union) and len(value) != 1:
        raise CheckpointError(f"holds {place} with {len(value)} meanings")
    required = set() if issubclass(kind, _Union) else _required(kind)
    if missing := sorted(required - set(value)):
        raise CheckpointError(f"holds {place} without {missing[0]}")
    for key, item in value.items():
        check(item, fields[key], f"{place}.{key}", depth + 1)
    if kind is schema.SymExpr:
        check_size(value["expr_str"])


def _check_plain(value: Any, kind: Any, place: str) -> None:
    if isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        if type(value) is not int or value not in set(map(int, kind)):
            raise CheckpointError(f"holds {place} = {value!r}, which is no {kind.__name__}")
    elif kind is float:
        if not isinstance(value, int | float) and value not in _FLOATS:
            raise CheckpointError(f"holds {place}, which is no number")
    elif kind is int:
        if type(value) is not int or abs(value) >= 1 << 63:
            raise CheckpointError(f"holds {place}, which is no number")
    else:
        _expect(value, kind, place)


def _expect(value: Any, kind: type, place: str) -> None:
    if type(value) is not kind:
        raise CheckpointError(f"holds {place}, which is no {kind.__name__}")


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _required(kind: Any) -> frozenset[str]:
    return frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
