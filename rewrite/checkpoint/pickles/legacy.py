"""The format of `torch.save` before zip archives (until 1.5, and still on request).

    file = magic, protocol, system, object, keys      five pickles, one after the other
         + for each key: length, then its bytes       length * size of an element

Only the object refers to tensors, by key. There are no checksums; lengths are compared with what
the object says and with the size of the file before any memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import torch

from rewrite.checkpoint.archive import fill
from rewrite.checkpoint.pickles.tensors import Reference
from rewrite.checkpoint.vetting.opcodes import Program, Stored, walk
from rewrite.checkpoint.vetting.programs import parse_legacy
from rewrite.errors import CheckpointError


@dataclass(frozen=True)
class _Parts:
    """Where in a file the bytes of each storage are."""

    stream: IO[bytes]
    places: dict[str, tuple[int, int]]

    def storage(self, key: str, size: int) -> torch.UntypedStorage:
        if key not in self.places:
            raise CheckpointError(f"has no tensor {key}")
        start, length = self.places[key]
        if length < size:
            raise CheckpointError(f"tensor {key} has {length} bytes instead of {size}")
        own = torch.empty(length, dtype=torch.uint8)
        self.stream.seek(start)
        fill(self.stream, own)
        return own.untyped_storage()


def read_legacy(stream: IO[bytes], size: int) -> tuple[Program, _Parts]:
    """Return the object of a file of the old format, and the reader of its tensors.

    Raises:
        CheckpointError: it is damaged, or is no such file.
    """
    program, keys = parse_legacy(stream)
    widths: dict[str, int] = {}
    for event in program.events:
        for node in walk(event.node) if isinstance(event.node, Stored) else ():
            reference = Reference.of(node)  # type: ignore[arg-type]  # a Stored holds no other node
            width = widths.setdefault(reference.key, reference.dtype.itemsize)
            if width != reference.dtype.itemsize:
                raise CheckpointError(f"has a tensor {reference.key} of two types")
    places = {}
    for key in keys:
        length = int.from_bytes(stream.read(8), "little", signed=True) * widths.get(key, 1)
        start = stream.tell()
        if length < 0 or start + length > size or key in places:
            raise CheckpointError("is truncated or damaged (a tensor is longer than the file)")
        places[key] = (start, length)
        stream.seek(start + length)
    return program, _Parts(stream, places)
