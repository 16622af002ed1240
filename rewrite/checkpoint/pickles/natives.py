"""Build plain values from a pickle: numbers, containers, paths, dates, arrays, enum members.

    name(args), then a state  ->  a value          args and state checked against the one form that
                                                   Python, numpy and torch themselves write

Each name stands for a function of this file, never for what it names in Python.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import pathlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from rewrite.errors import CheckpointError

_DTYPE = re.compile(r"[|<>=]?([biufc]\d{1,2}|[SU]\d{1,6}|[Mm]8(\[\d{0,3}[a-zA-Zμ]{1,2}\])?|\?|b1)")
_NUMBER = re.compile(
    r"[+-]?\d{1,1000}(\.\d{1,1000})?([eE][+-]?\d{1,4})?|[+-]?(s?NaN\d{0,50}|Infinity|Inf)", re.I
)
_FRACTION = re.compile(r"[+-]?\d{1,1000}(/\d{1,1000})?")

TYPES: dict[str, type] = {
    f"builtins.{kind.__name__}": kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, object)
}
"""Builtin types that a model may keep as a value."""

CONSTANTS: dict[str, Any] = {
    **TYPES,
    "builtins.Ellipsis": Ellipsis,
    "builtins.NotImplemented": NotImplemented,
    "torch.Tensor": torch.Tensor,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch.Size": torch.Size,
    "numpy.ndarray": np.ndarray,
    "collections.OrderedDict": collections.OrderedDict,
    **{
        f"torch.{name}": value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.qscheme)
    },
    **{
        f"{place}.{kind.__name__}": kind
        for kind in {np.dtype(code).type for code in "?bBhHiIlLqQefdFDSUMm"}
        for place in ("numpy",)
    },
}
"""Names that stand for a value as they are."""


def _typed(kind: type | tuple[type, ...], args: Sequence[Any], counts: Sequence[int]) -> None:
    expected = kind if isinstance(kind, tuple) else (kind,)
    if len(args) not in counts or not all(type(value) in expected for value in args):
        raise CheckpointError("makes a plain value of something else")


def one_list(*args: Any) -> Sequence[Any]:
    """Return the items of the only argument of a set or a dict, which has to be a list."""
    if len(args) > 1 or (args and not isinstance(args[0], list | tuple | set)):
        raise CheckpointError("makes a set of what is no list")
    return list(args[0]) if args else []


def _ordered(*args: Any) -> collections.OrderedDict[Any, Any]:
    pairs = one_list(*args)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise CheckpointError("makes a dict of what is no pairs")
    return collections.OrderedDict((key, value) for key, value in pairs)


def _default(*args: Any) -> collections.defaultdict[Any, Any]:
    made = args[0] if args else None
    if len(args) > 1 or not (made is None or made in TYPES.values()):
        raise CheckpointError("makes a defaultdict of something that is no builtin type")
    return collections.defaultdict(made)


def _counter(*args: Any) -> collections.Counter[Any]:
    if len(args) > 1 or not all(isinstance(value, dict) for value in args):
        raise CheckpointError("makes a Counter of what is no dict")
    return collections.Counter(*args)


def _deque(*args: Any) -> collections.deque[Any]:
    items = one_list(*args[:1])
    _typed((int, type(None)), args[1:], (0, 1))
    limit = args[1] if len(args) == 2 else None
    if (limit or 0) < 0:
        raise CheckpointError("makes a deque of a negative length")
    return collections.deque(items, limit)


def _fraction(*args: Any) -> fractions.Fraction:
    """Return a fraction of the text that older versions of Python write, or of two numbers."""
    if len(args) == 1:
        return _number(fractions.Fraction, _FRACTION)(*args)  # type: ignore[no-any-return]  # of the kind that is passed
    _typed(int, args, (2,))
    if args[1] == 0 or any(abs(number).bit_length() > 4096 for number in args):
        raise CheckpointError("holds a number that is none")
    return fractions.Fraction(*args)


def _slice(*args: Any) -> slice:
    _typed((int, float, str, type(None)), args, (1, 2, 3))
    return slice(*args)


def _range(*args: Any) -> range:
    _typed(int, args, (1, 2, 3))
    try:
        return range(*args)
    except ValueError as error:
        raise CheckpointError(f"holds a range: {error}") from error


def _complex(*args: Any) -> complex:
    _typed((int, float), args, (1, 2))
    return complex(*args)


def _encode(*args: Any) -> bytes:
    _typed(str, args, (2,))
    if args[1] != "latin1":
        raise CheckpointError("encodes bytes in another way than latin1")
    text: str = args[0]
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise CheckpointError("holds bytes that are no bytes") from error


def _bytes(kind: type) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        _typed(bytes, args, (0, 1))
        return kind(*args)

    return make


def _type(*args: Any) -> type:
    if args != (None,):
        raise CheckpointError("asks for the type of something")
    return type(None)


def _path(kind: type[pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    def make(*parts: Any) -> pathlib.PurePath:
        _typed(str, parts, range(1000))
        return kind(*parts)

    return make


def _dated(kind: Any, length: int) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        zone = args[1:]
        if not (args and isinstance(args[0], bytes) and len(args[0]) == length):
            raise CheckpointError("holds a date that is none")
        if len(zone) > 1 or not all(isinstance(value, datetime.timezone) for value in zone):
            raise CheckpointError("holds a date in no time zone")
        try:
            return kind(*args)
        except (TypeError, ValueError) as error:
            raise CheckpointError("holds a date that is none") from error

    return make


def _timedelta(*args: Any) -> datetime.timedelta:
    _typed(int, args, (3,))
    try:
        return datetime.timedelta(*args)
    except OverflowError as error:
        raise CheckpointError("holds a span of time that is too long") from error


def _timezone(*args: Any) -> datetime.timezone:
    _typed(datetime.timedelta, args[:1], (1,))
    _typed(str, args[1:], (0, 1))
    try:
        return datetime.timezone(*args)
    except ValueError as error:
        raise CheckpointError("holds a time zone that is none") from error


def _number(kind: Any, form: re.Pattern[str]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        _typed(str, args, (1,))
        if form.fullmatch(args[0]) is None:
            raise CheckpointError("holds a number that is none")
        try:
            return kind(args[0])
        except (ArithmeticError, ValueError) as error:
            raise CheckpointError("holds a number that is none") from error

    return make


def _size(*args: Any) -> torch.Size:
    sizes = one_list(*args)
    _typed(int, sizes, range(65))
    return torch.Size(sizes)


def _device(*args: Any) -> torch.device:
    if not (1 <= len(args) <= 2 and type(args[0]) is str and all(type(a) is int for a in args[1:])):
        raise CheckpointError("holds a device that is none")
    try:
        return torch.device(*args)
    except RuntimeError as error:
        raise CheckpointError("holds a device that is none") from error


def _layout(*args: Any) -> torch.layout:
    found = getattr(torch, str(args[0]).removeprefix("torch."), None) if len(args) == 1 else None
    if not isinstance(found, torch.layout):
        raise CheckpointError("holds a layout that is none")
    return found


def _version(*args: Any) -> TorchVersion:
    _typed(str, args, (1,))
    return TorchVersion(args[0])


def _namespace(kind: type) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        _typed(str, args, (0,))
        return kind()

    return make


def dtype_of(*args: Any) -> np.dtype[Any]:
    """Return numpy's type of a short name: numbers, texts and dates, nothing that holds objects."""
    text = args[0] if args else None
    if not isinstance(text, str) or _DTYPE.fullmatch(text) is None or len(args) > 3:
        raise CheckpointError(f"holds numpy values of type {str(text)[:30]!r}")
    try:
        return np.dtype(text)
    except TypeError as error:
        raise CheckpointError(f"holds numpy values of type {text!r}") from error


def with_state(dtype: np.dtype[Any], state: Any) -> np.dtype[Any]:
    """Return numpy's type with the byte order and the unit that its state gives."""
    if not (isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)):
        raise CheckpointError("holds numpy values of a type with fields")
    if state[1] not in ("<", ">", "|", "="):
        raise CheckpointError("holds numpy values in no byte order")
    unit = state[8] if len(state) > 8 else None
    if dtype.kind in "mM" and isinstance(unit, tuple):
        name, step = unit[1][:2]
        text = name.decode("latin1") if isinstance(name, bytes) else str(name)
        dtype = dtype_of(f"{dtype.kind}8[{int(step)}{text}]" if text != "generic" else dtype.str)
    if dtype.kind in "SU" and isinstance(state[5], int) and 0 <= state[5] < 1 << 20:
        dtype = dtype_of(f"{dtype.kind}{state[5] // (4 if dtype.kind == 'U' else 1)}")
    return dtype if state[1] in "|=" else dtype.newbyteorder(state[1])


def _scalar(*args: Any) -> Any:
    dtype, data = args if len(args) == 2 else (None, None)
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise CheckpointError("holds a numpy number that is none")
    if len(data) != dtype.itemsize or not dtype.itemsize:
        raise CheckpointError("holds a numpy number of another length than its type")
    return np.frombuffer(data, dtype)[0]


def _array(*args: Any) -> np.ndarray[Any, Any]:
    if len(args) != 3 or args[0] is not np.ndarray or args[1] not in ((0,), 0):
        raise CheckpointError("holds a numpy array of a class of its own")
    return np.ndarray((0,), np.uint8)


def fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    """Give an array its shape, type and bytes, as numpy pickles them."""
    _, shape, dtype, fortran, data = state if len(state) == 5 else (1, *state)
    target: Any = array
    target.__setstate__((1, *_checked(shape, dtype, data), bool(fortran), data))


def _buffer(*args: Any) -> np.ndarray[Any, Any]:
    given: Sequence[Any] = args if len(args) == 4 else (b"", None, None, None)
    data, dtype, shape, order = given
    shape, dtype = _checked(shape, dtype, data)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C").copy()


def _checked(shape: Any, dtype: Any, data: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if not (
        isinstance(dtype, np.dtype)
        and isinstance(data, bytes | bytearray)
        and isinstance(shape, tuple)
        and all(type(n) is int and n >= 0 for n in shape)
    ):
        raise CheckpointError("holds a numpy array of objects")
    count = 1
    for n in shape:
        count *= n
    if len(shape) > 32 or count * dtype.itemsize != len(data):
        raise CheckpointError("holds a numpy array of another size than its bytes")
    return shape, dtype


_POSIX: type[pathlib.PurePath] = pathlib.Path

BUILDERS: Mapping[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "argparse.Namespace": _namespace(argparse.Namespace),
    "types.SimpleNamespace": _namespace(types.SimpleNamespace),
    "builtins.bytearray": _bytes(bytearray),
    "builtins.bytes": _bytes(bytes),
    "builtins.complex": _complex,
    "builtins.frozenset": lambda *args: frozenset(one_list(*args)),
    "builtins.range": _range,
    "builtins.set": lambda *args: set(one_list(*args)),
    "builtins.slice": _slice,
    "builtins.type": _type,
    "collections.Counter": _counter,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default,
    "collections.deque": _deque,
    "datetime.date": _dated(datetime.date, 4),
    "datetime.datetime": _dated(datetime.datetime, 10),
    "datetime.time": _dated(datetime.time, 6),
    "datetime.timedelta": _timedelta,
    "datetime.timezone": _timezone,
    "decimal.Decimal": _number(decimal.Decimal, _NUMBER),
    "fractions.Fraction": _fraction,
    "numpy.dtype": dtype_of,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray.scalar", _scalar),
            ("multiarray._reconstruct", _array),
            ("numeric._frombuffer", _buffer),
        )
    },
    **{
        f"pathlib{place}.{name}": _path(kind)
        for place in ("", "._local")
        for name, kind in (
            ("PosixPath", _POSIX),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("Path", _POSIX),
            ("PurePath", pathlib.PurePath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    },
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "torch.torch_version.TorchVersion": _version,
}
"""What a name builds. A state is given by `give_state`."""


def give_state(value: Any, state: Any) -> Any:
    """Return a plain value after its state: attributes of namespaces, numpy's bytes.

    Raises:
        CheckpointError: values of this kind have no such state.
    """
    if isinstance(value, np.dtype):
        return with_state(value, state)
    if isinstance(value, np.ndarray):
        fill_array(value, state)
        return value
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        if not (isinstance(state, dict) and all(_is_name(key) for key in state)):
            raise CheckpointError("holds a namespace with names that are none")
        vars(value).update(state)
        return value
    if isinstance(value, collections.OrderedDict) and isinstance(state, dict):
        if set(state) - {"_metadata"} or not isinstance(state.get("_metadata", {}), dict):
            raise CheckpointError("holds a dict with attributes of its own")
        vars(value).update(state)
        return value
    if isinstance(value, TorchVersion) and not state:
        return value
    raise CheckpointError(f"gives a state to a {type(value).__name__}, which has none")


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and not key.startswith("__")
