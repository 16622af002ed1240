"""Read checkpoint archives: members of a zip file, or sections of the older format.

    member = (name, size, checksum)      all known before a byte of it is read
    size of all members <= 20 * size of the file + 256 MiB

Two members of one name (letter case aside) would let two readers see two files, so such an archive
is refused; so are encrypted members and members that share bytes. Python's `zipfile` unpacks and
compares each member with its CRC-32; an archive that was written without checksums has zeros there.
"""

from __future__ import annotations

import copy
import ctypes
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from rewrite.errors import CheckpointError, one_line, system_reason
from rewrite.files import no_file

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 22
_SPARE, _EXPANSION = 256 << 20, 20
LARGEST_PROGRAM = 64 << 20
"""How long a pickle or a JSON member may be: what describes a model, not its weights."""


class TensorBytes(Protocol):
    """Where the bytes of tensors come from."""

    def storage(self, key: str, size: int) -> torch.UntypedStorage:
        """Return the bytes of one storage in memory of their own."""
        ...


class Archive:
    """The members of a zip archive below its root folder."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Read the directory of an archive.

        Raises:
            CheckpointError: it is damaged, or its members are not what they say.
        """
        try:
            self._zip = zipfile.ZipFile(stream)
            infos = [info for info in self._zip.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
            raise CheckpointError(f"is truncated or damaged ({one_line(error)})") from error
        except struct.error as error:
            raise CheckpointError("is truncated or damaged (its directory)") from error
        _check_members(infos, stream.seek(0, io.SEEK_END))
        self._members = {info.filename: info for info in infos}
        self.root = _root(self._members)
        self.names = frozenset(
            name.removeprefix(self.root) for name in self._members if name.startswith(self.root)
        )

    def size(self, name: str) -> int:
        """Return how many bytes a member has."""
        return self._info(name).file_size

    def read(self, name: str) -> bytes:
        """Return a member that describes something: a pickle, a JSON text.

        Raises:
            CheckpointError: it is not there, too long, or damaged.
        """
        if self.size(name) > LARGEST_PROGRAM:
            raise CheckpointError(f"holds {name} of {self.size(name)} bytes, which is too long")
        with _reading(name), self._open(name) as member:
            return member.read()

    def storage(self, key: str, size: int) -> torch.UntypedStorage:
        """Return the first `size` bytes of the member `key`, checked against its checksum.

        Raises:
            CheckpointError: it is not there, of another length, or damaged.
        """
        held = self.size(key)
        if held < size:
            raise CheckpointError(f"{key} has {held} bytes instead of {size}")
        import torch

        own = torch.empty(held, dtype=torch.uint8)
        with _reading(key), self._open(key) as member:
            fill(member, own)
            if member.read(1):
                raise CheckpointError(f"{key} is longer than it says")
        return own.untyped_storage()

    def _info(self, name: str) -> zipfile.ZipInfo:
        found = self._members.get(self.root + name)
        if found is None:
            raise CheckpointError(f"has no {name}")
        return found

    def _open(self, name: str) -> IO[bytes]:
        info = self._info(name)
        if info.CRC == 0 and info.file_size:
            # torch.serialization.set_crc32_options(False): there is nothing to compare with.
            info = copy.copy(info)
            del info.CRC
        return self._zip.open(info)


def fill(stream: IO[bytes], own: torch.Tensor) -> None:
    """Read from `stream` until the bytes of `own` are full.

    Raises:
        CheckpointError: the stream ends before that.
    """
    # Not by way of numpy: a storage that numpy has seen can never be shared copy-on-write.
    left = memoryview((ctypes.c_char * own.nbytes).from_address(own.data_ptr())).cast("B")
    while left:
        data = stream.read(min(len(left), _CHUNK))
        if not data:
            raise CheckpointError("is truncated: a tensor has fewer bytes than it says")
        left[: len(data)] = data
        left = left[len(data) :]


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; raise CheckpointError when it is none, or the system refuses."""
    if wrong := no_file(path):
        raise CheckpointError(f"{path}: {wrong}")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    with stream:
        yield stream


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{name} is damaged ({one_line(error)})") from error
    except (RuntimeError, zlib.error, struct.error) as error:
        raise CheckpointError(f"{name} cannot be read ({one_line(error)})") from error


def _check_members(infos: list[zipfile.ZipInfo], size: int) -> None:
    seen: set[str] = set()
    for info in infos:
        folded = info.filename.casefold()
        if folded in seen:
            raise CheckpointError(f"holds two members called {info.filename!r}")
        seen.add(folded)
        if info.flag_bits & 0x1:
            raise CheckpointError(f"holds {info.filename!r}, which is encrypted")
    if sum(info.compress_size for info in infos) > size:
        raise CheckpointError("holds members that share their bytes")
    total = sum(info.file_size for info in infos)
    if total > _EXPANSION * size + _SPARE:
        raise CheckpointError(f"has {size} bytes and would expand to {total}")


def _root(members: dict[str, Any]) -> str:
    """Return the folder of the archive in which everything lies, "" where there is none."""
    for last in ("data.pkl", "archive_format"):
        roots = [name.removesuffix(last) for name in members if name.split("/")[-1] == last]
        if len(roots) > 1:
            raise CheckpointError(f"holds {len(roots)} members called {last}")
        if roots:
            return roots[0]
    folders = {name.partition("/")[0] for name in members}
    return f"{folders.pop()}/" if len(folders) == 1 and "/" in next(iter(members)) else ""
