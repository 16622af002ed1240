"""The header of a safetensors file, and single tensors read through it.

    u64 n | n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}} | data

Tensors are read, not mapped: a mapped page counts as resident until the system reclaims it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError, system_reason
from rewrite.files import no_file

_LARGEST_HEADER = 100_000_000
"""Bytes: what the format itself allows."""

_BLOCK = 1 << 24
"""Bytes that are compared at a time."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types whose tensors can be computed with; others are copied as they are."""

_BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64}


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
class SafetensorsFile:
    """A safetensors file: its entries by name, in the order of their offsets, and its metadata."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int
    """Where the data begin."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, block by block.

        Raises:
            CheckpointError: the file cannot be read.
        """
        entry = self.entries[name]
        with self.open() as stream:
            stream.seek(self.data + entry.begin)
            for begin in range(0, entry.size, _BLOCK):
                yield stream.read(min(_BLOCK, entry.size - begin))

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory.

        Raises:
            CheckpointError: torch has no such dtype, or the file cannot be read.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is of type {entry.dtype}, which is stored, not computed "
                "with; give a checkpoint in bfloat16, float16 or float32"
            )
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        with self.open() as stream:
            self.fill(stream, name, 0, tensor)
        return tensor

    @contextlib.contextmanager
    def open(self) -> Iterator[FileIO]:
        """Open the file to read from.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with self.path.open("rb", buffering=0) as stream:
                yield stream
        except OSError as error:
            raise CheckpointError(f"{self.path}: {system_reason(error)}") from error

    def fill(self, stream: FileIO, name: str, begin: int, tensor: Tensor) -> None:
        """Read into `tensor`, which is contiguous, the bytes of one of the file from `begin` on.

        Raises:
            CheckpointError: the file ends before.
        """
        content = bytes_of(tensor)
        stream.seek(self.data + self.entries[name].begin + begin)
        while content:  # the system reads at most 2 GB at once
            if not (done := stream.readinto(content)):
                raise CheckpointError(f"{self.path}: ends within {name}")
            content = content[done:]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a file.

    Raises:
        CheckpointError: it cannot be read, is no safetensors file, or is truncated.
    """
    if wrong := no_file(path):
        raise CheckpointError(f"{path}: {wrong}")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path}: is no safetensors file, or is cut off")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is damaged (no object)")
    metadata = header.pop("__metadata__", None) or {}
    entries = {str(name): _entry(path, str(name), held) for name, held in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, entry in entries.items():
        if entry.begin != at:
            raise CheckpointError(f"{path}: {name} does not begin where the tensor before it ends")
        at = entry.end
    if 8 + length + at != size:
        raise CheckpointError(f"{path}: has {size} bytes where its header says {8 + length + at}")
    return SafetensorsFile(path, entries, metadata, 8 + length)


def _entry(path: Path, name: str, held: Any) -> Entry:
    try:
        dtype, shape = str(held["dtype"]), tuple(held["shape"])
        begin, end = held["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry of {name} is damaged") from None
    whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    bits = _BITS.get(dtype)
    if dtype in DTYPES:
        bits = 8 * torch.empty(0, dtype=DTYPES[dtype]).element_size()
    if not whole or (bits is not None and 8 * (end - begin) != bits * math.prod(shape)):
        raise CheckpointError(f"{path}: the header's entry of {name} is damaged")
    return Entry(dtype, shape, begin, end)


def header_of(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Return the header of a file that stores `tensors` in order, and their entries.

    Args:
        tensors: dtype as the format spells it, shape and number of bytes, by name.
        metadata: the `__metadata__` of the file.
    """
    entries, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = Entry(dtype, shape, at, at + size)
        at += size
    held: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        held[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, entries


def type_name(dtype: torch.dtype) -> str:
    """Return the format's name of a dtype: "BF16" for `torch.bfloat16`."""
    return next(name for name, held in DTYPES.items() if held == dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as the format stores them; a contiguous one is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


def copy_range(source: int, target: int, begin: int, length: int, at: int) -> None:
    """Copy `length` bytes between file descriptors, in the kernel where possible."""
    while length:
        if hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(source, target, length, begin, at)
            except OSError:
                done = os.pwrite(target, os.pread(source, min(length, 1 << 24), begin), at)
        else:
            done = os.pwrite(target, os.pread(source, min(length, 1 << 24), begin), at)
        if not done:
            raise OSError("a file ended while it was copied")
        begin, at, length = begin + done, at + done, length - done
