"""Judge the header of a safetensors file: what each tensor says has to be what lies there.

    u64 n | n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}} | data
    begin of the next = end of the last;  8 (end - begin) = bits(dtype) * product(shape)

The library says the same of most files; here it is said without torch, and of two keys of one name,
of which a reader of JSON keeps the last.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rewrite.checkpoint.archive import opened
from rewrite.errors import CheckpointError
from rewrite.files import named_twice

_LONGEST_HEADER = 100_000_000
"""How long the header may be; the library says the same."""

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Of a type that is not named here the length is the library's to judge."""


def tensor_count(path: Path) -> int:
    """Return how many tensors a safetensors file has, by its header.

    Raises:
        CheckpointError: the header is none, or does not say what the file holds.
    """
    with opened(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        data = path.stat().st_size - 8 - length
        if length > _LONGEST_HEADER or data < 0:
            raise CheckpointError("is no readable safetensors file (its header is too long)")
        text = stream.read(length)
    try:
        header: Any = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("is no readable safetensors file (its header)") from error
    if not isinstance(header, dict):
        raise CheckpointError("is no readable safetensors file (its header)")
    header.pop("__metadata__", None)
    at = 0
    for begin, end, name in sorted(_span(name, entry) for name, entry in header.items()):
        if begin != at:
            raise CheckpointError(f"{name!r} does not begin where the tensor before it ends")
        at = end
    if at != data:
        raise CheckpointError(f"has {data} bytes of tensors where its header says {at}")
    return len(header)


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Return where a tensor begins and ends."""
    try:
        kind, shape, (begin, end) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        whole = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"says nothing readable of {name!r}")
    bits = _BITS.get(kind)
    if end < begin or (bits is not None and 8 * (end - begin) != bits * math.prod(shape)):
        raise CheckpointError(f"has {end - begin} bytes for {name!r} of {kind} {tuple(shape)}")
    return begin, end, name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := named_twice(pairs)) is not None:
        raise CheckpointError(f"names {twice!r} twice")
    return dict(pairs)
