"""Write a file completely or not at all.

    content -> temporary file in the target's folder -> fsync -> rename onto the target

A rename inside one folder is atomic, so a reader sees the old file or the new one, and a crash
leaves the old one alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rewrite.errors import CheckpointError, system_reason


def check_writable(path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Raise CheckpointError when `path` cannot become a file; touch nothing.

    Call it before expensive work, so that a typo in an output path costs nothing.
    """
    target = Path(path)
    folder = target.parent
    try:
        taken = target.exists()
    except OSError as error:
        raise CheckpointError(f"{target}: {_reason(error)}") from error
    if target.is_dir():
        raise CheckpointError(f"{target}: is a folder; give a file name inside it")
    if not folder.is_dir():
        raise CheckpointError(f"{target}: the folder {folder} does not exist; create it first")
    if taken and not overwrite:
        raise CheckpointError(f"{target}: already exists; choose another place or pass --force")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target}: no permission to write into the folder {folder}")
    return target


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block succeeds.

    For writers that open a path by themselves. When the block raises, the temporary file is
    removed and an older file at `path` stays as it was. Without `overwrite` a file that appears
    at `path` while the block runs is not replaced either.
    """
    target = check_writable(path, overwrite=overwrite)
    # A link stays a link: the file behind it is what gets replaced.
    place = target.resolve()
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        _publish(temporary, place, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"{target}: {_reason(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(
    path: str | os.PathLike[str], content: bytes | str, *, overwrite: bool = True
) -> Path:
    """Write `content` (text as UTF-8) to `path` completely or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def _publish(temporary: Path, place: Path, *, overwrite: bool) -> None:
    """Flush `temporary` to the disk and rename it onto `place`."""
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(_mode(place))
    if overwrite:
        temporary.replace(place)
        return
    # A hard link fails when the name is taken, which a rename does not.
    os.link(temporary, place)


def _mode(place: Path) -> int:
    """Return the permission bits that a plain `open(place, "w")` would leave."""
    if place.exists():
        return place.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _reason(error: OSError) -> str:
    """Say in words what an OSError means for somebody who wants a file written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing was written"
    if error.errno == errno.EFBIG:
        return "the file is larger than this system allows; nothing was written"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission to write here"
    if error.errno == errno.EROFS:
        return "the file system is read-only"
    if error.errno == errno.EEXIST:
        return "already exists; choose another place or pass --force"
    return system_reason(error)
