"""Write files completely or not at all, and those of one command together.

    content -> file without a name -> fsync -> link or rename onto the target
    files of one command: all are staged first, then all get their names, or none does

A file without a name (`O_TMPFILE`) vanishes with its process, so a kill leaves nothing behind. A
rename inside one folder is atomic: a reader sees the old file or the new one. Where a file system
has no such files, a hidden one beside the target is used and removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from rewrite.errors import CheckpointError, system_reason


def check_writable(path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Raise CheckpointError when `path` cannot become a file; touch nothing.

    Call it before expensive work, so that a typo in an output path costs nothing.
    """
    target = Path(path)
    try:
        place = target.resolve()
        taken = os.path.lexists(place)
        kind = place.stat().st_mode if taken else stat.S_IFREG
    except (OSError, RuntimeError, ValueError) as error:
        reason = _reason(error) if isinstance(error, OSError) else "is no path of a file"
        raise CheckpointError(f"{target}: {reason}") from error
    folder = target.parent if place.parent == target.parent.resolve() else place.parent
    if stat.S_ISDIR(kind):
        raise CheckpointError(f"{target}: is a folder; give a file name inside it")
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{target}: is a pipe or a device, not a file; give another place")
    if not folder.is_dir():
        raise CheckpointError(f"{target}: the folder {folder} does not exist; create it first")
    if taken and not overwrite:
        raise CheckpointError(f"{target}: already exists; choose another place or pass --force")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target}: no permission to write into the folder {folder}")
    return target


@dataclass
class _Staged:
    """A file with its content on the disk, and the name that it will get."""

    target: Path
    place: Path
    overwrite: bool
    handle: int = -1
    name: Path | None = None

    @property
    def path(self) -> Path:
        """Return where writers and readers find the content."""
        return self.name if self.name is not None else Path(f"/proc/self/fd/{self.handle}")

    def named(self) -> Path:
        """Return a hidden name beside the target that the content has."""
        if self.name is None:
            hidden = self.place.with_name(f".{self.place.name[:200]}.{os.getpid()}.tmp")
            hidden.unlink(missing_ok=True)
            self.link(hidden)
            self.name = hidden
        return self.name

    def link(self, name: Path) -> None:
        """Give the content one more name; raise FileExistsError when it is taken."""
        if self.name is not None:
            os.link(self.name, name)
            return
        folder = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # A folder's handle makes this linkat(2), which follows the link in /proc.
            os.link(self.path, name.name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let go of the content, and of its hidden name."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1
        if self.name is not None:
            self.name.unlink(missing_ok=True)
            self.name = None


@dataclass
class Publication:
    """The files of one command, staged and not yet published."""

    staged: list[_Staged] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def publish(self) -> tuple[Path, ...]:
        """Give every staged file its name, or none; return the targets, in their order.

        Raises:
            CheckpointError: a name was taken meanwhile, or the system refuses.
        """
        before: list[tuple[_Staged, Path | None]] = []
        with _undisturbed():
            try:
                for staged in self.staged:
                    before.append((staged, _backup(staged) if len(self.staged) > 1 else None))
                    _rename(staged)
            except OSError as error:
                for staged, old in reversed(before):
                    _undo(staged, old, failed=staged is before[-1][0])
                raise CheckpointError(f"{before[-1][0].target}: {_reason(error)}") from error
            finally:
                for _, old in before:
                    if old is not None:
                        old.unlink(missing_ok=True)
                made = [staged.target for staged in self.staged]
                self.close()
        self.written += made
        return tuple(made)

    def close(self) -> None:
        """Throw away what was not published."""
        while self.staged:
            self.staged.pop().close()


_CURRENT: ContextVar[Publication | None] = ContextVar("publication", default=None)


@contextlib.contextmanager
def publication() -> Iterator[Publication]:
    """Collect every file that is written inside; `publish` names them, else they vanish."""
    found = Publication()
    token = _CURRENT.set(found)
    try:
        yield found
    finally:
        _CURRENT.reset(token)
        found.close()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path whose content becomes the file `path` when the block succeeds.

    For writers that open a path by themselves. When the block raises, nothing is left and an
    older file at `path` stays as it was. Without `overwrite` a file that appears at `path` while
    the block runs is not replaced either. Inside of a `publication` the file gets its name with
    the others.
    """
    target = check_writable(path, overwrite=overwrite)
    # A link stays a link: the file behind it is what gets replaced.
    staged = _Staged(target, target.resolve(), overwrite)
    collected = _CURRENT.get()
    try:
        _open(staged)
        yield staged.path
        _flush(staged)
        if collected is None:
            alone = Publication([staged])
            alone.publish()
        else:
            collected.staged.append(staged)
    except OSError as error:
        staged.close()
        raise CheckpointError(f"{target}: {_reason(error)}") from error
    except BaseException:
        staged.close()
        raise


def write_bytes(
    path: str | os.PathLike[str], content: bytes | str, *, overwrite: bool = True
) -> Path:
    """Write `content` (text as UTF-8) to `path` completely or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def _open(staged: _Staged) -> None:
    """Make a file without a name in the target's folder, or one with a hidden name."""
    with contextlib.suppress(OSError):
        staged.handle = os.open(staged.place.parent, os.O_TMPFILE | os.O_RDWR, 0o600)
        if staged.path.exists():
            return
        staged.close()
    handle, name = tempfile.mkstemp(
        dir=staged.place.parent, prefix=f".{staged.place.name[:200]}.", suffix=".tmp"
    )
    staged.handle, staged.name = handle, Path(name)


def _flush(staged: _Staged) -> None:
    """Bring the content to the disk, with the permissions of an ordinary file."""
    if staged.name is not None:
        # A writer may have put another file in the place of the first.
        os.close(staged.handle)
        staged.handle = os.open(staged.name, os.O_RDWR)
    os.fsync(staged.handle)
    os.fchmod(staged.handle, _mode(staged.place))


def _rename(staged: _Staged) -> None:
    """Give the content its name, in one step."""
    if not staged.overwrite:
        # A hard link fails when the name is taken, which a rename does not.
        staged.link(staged.place)
    else:
        staged.named().replace(staged.place)
        staged.name = None
    folder = os.open(staged.place.parent, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        os.fsync(folder)
    os.close(folder)


def _backup(staged: _Staged) -> Path | None:
    """Return a second name of the file that is to be replaced, None where there is none."""
    if not staged.place.exists():
        return None
    old = staged.place.with_name(f".{staged.place.name[:200]}.{os.getpid()}.old")
    old.unlink(missing_ok=True)
    os.link(staged.place, old)
    return old


def _undo(staged: _Staged, old: Path | None, *, failed: bool) -> None:
    """Put back what was there before."""
    if old is not None:
        old.replace(staged.place)
    elif not failed:
        staged.place.unlink(missing_ok=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait while files get their names."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
