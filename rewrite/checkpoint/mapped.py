"""Read tensors that are mapped from a file into memory of their own, without holding them twice.

    bytes(storage) = file[offset + address(storage) - start]     while nobody wrote to the mapping

torch has no copy-on-write form of a mapped tensor. Copying it out of the mapping would make both
resident; reading the same bytes from the file leaves the pages of the mapping untouched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

_SMAPS = Path("/proc/self/smaps")


@dataclass(frozen=True)
class Mapping:
    """A part of a file that this process has mapped and not written to."""

    start: int
    end: int
    offset: int

    def place(self, storage: torch.UntypedStorage) -> int | None:
        """Return where in the file the bytes of `storage` are, if they are in this part."""
        address = storage.data_ptr()
        inside = self.start <= address and address + storage.nbytes() <= self.end
        return self.offset + address - self.start if inside else None


class MappedFile:
    """A file, and where it is mapped; on systems that do not say so, nowhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mappings = tuple(_mappings(path.resolve()))

    def read(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return the bytes of a storage in memory of their own."""
        size = storage.nbytes()
        own = torch.empty(size, dtype=torch.uint8, device=storage.device).untyped_storage()
        for place in (mapping.place(storage) for mapping in self._mappings):
            if place is not None:
                with self._path.open("rb", buffering=0) as stream:
                    stream.seek(place)
                    if _fill(stream, own):
                        return own
        own.copy_(storage)
        return own


def _fill(stream: FileIO, own: torch.UntypedStorage) -> bool:
    """Read until `own` is full; one call reads two gigabytes at most."""
    # Not by way of numpy: a storage that numpy has seen can never be shared copy-on-write.
    left = memoryview((ctypes.c_char * own.nbytes()).from_address(own.data_ptr()))
    while left:
        count = stream.readinto(left)
        if not count:
            return False
        left = left[count:]
    return True


def _mappings(path: Path) -> Iterator[Mapping]:
    if not _SMAPS.exists():
        return
    current: Mapping | None = None
    with _SMAPS.open() as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if "-" in first:
                fields = rest.split(maxsplit=4)
                named = len(fields) == 5 and fields[4].rstrip("\n") == str(path)
                start, _, end = first.partition("-")
                current = (
                    Mapping(int(start, 16), int(end, 16), int(fields[1], 16)) if named else None
                )
            elif first == "Anonymous:" and current is not None and rest.split()[0] == "0":
                # A page that was written to is anonymous: it no longer is what the file says.
                yield current
