"""Single tensors of a safetensors file, read through its header.

Tensors are read, not mapped: a mapped page counts as resident until the system reclaims it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from rewrite.errors import CheckpointError, system_reason
from rewrite.files.safetensors_header import Entry, Header, read_header

_BLOCK = 1 << 24
"""Bytes that are compared at a time."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types whose tensors can be computed with; others are copied as they are."""


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, by its header."""

    path: Path
    header: Header

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The tensors by name, in the order of their offsets."""
        return self.header.entries

    @property
    def data(self) -> int:
        """Where the data begin."""
        return self.header.length

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
    return SafetensorsFile(path, read_header(path))


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
