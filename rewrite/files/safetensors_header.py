"""The header of a safetensors file, read and written without torch.

    u64 n | n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}} | data
    begin of the next = end of the last;  8 (end - begin) = bits(dtype) * product(shape)

The library says the same of most files; here it is said before torch is imported, and of two keys
of one name, of which a reader of JSON keeps the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewrite.errors import CheckpointError, system_reason
from rewrite.files.reading import named_twice, no_file

_LONGEST = 100_000_000
"""Bytes of a header: what the format allows."""

_METADATA = "__metadata__"

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Of a type that is not named here the length is the library's to judge."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the format spells it, its shape, its range of bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        entries: its tensors by name, in the order of their offsets, without a gap.
        metadata: texts by name.
        length: the bytes before the data.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    length: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and hold it to the size of the file.

    Raises:
        CheckpointError: the system refuses the file, it is no safetensors file or cut off, or its
            header does not say what it holds.
    """
    if wrong := no_file(path):
        raise CheckpointError(f"{path}: {wrong}")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST, size - 8):
                raise CheckpointError(f"{path}: is no safetensors file, or is cut off")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    try:
        return _header(text, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _header(text: bytes, size: int) -> Header:
    try:
        held: Any = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is damaged ({str(error)[:80]})") from error
    if not isinstance(held, dict):
        raise CheckpointError("its header is damaged (no object)")
    metadata = held.pop(_METADATA, None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CheckpointError(f"its header is damaged ({_METADATA} holds more than texts)")
    found = [(name, _entry(name, given)) for name, given in held.items()]
    entries = dict(sorted(found, key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, entry in entries.items():
        if entry.begin != at:
            raise CheckpointError(f"{name!r} does not begin where the tensor before it ends")
        at = entry.end
    length = 8 + len(text)
    if at != size - length:
        raise CheckpointError(f"has {size - length} bytes of tensors where its header says {at}")
    return Header(entries, metadata, length)


def _entry(name: str, given: Any) -> Entry:
    try:
        dtype, shape = str(given["dtype"]), given["shape"]
        begin, end = given["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"its header says nothing readable of {name!r}")
    bits = _BITS.get(dtype)
    if end < begin or (bits is not None and 8 * (end - begin) != bits * math.prod(shape)):
        raise CheckpointError(f"has {end - begin} bytes for {name!r} of {dtype} {tuple(shape)}")
    return Entry(dtype, tuple(shape), begin, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := named_twice(pairs)) is not None:
        raise CheckpointError(f"names {twice!r} twice")
    return dict(pairs)


def header_of(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Return the header of a file that stores `tensors` in order, and their entries.

    Args:
        tensors: dtype as the format spells it, shape and number of bytes, by name.
        metadata: the `__metadata__` of the file.
    """
    held: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    entries, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = Entry(dtype, shape, at, at + size)
        held[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, entries
