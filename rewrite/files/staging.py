"""Write files completely or not at all, and those of one command together.

    content -> file without a name -> fsync -> its name (`publishing`)
    files of one command: all are staged first, then all get their names, or none does

A file without a name (`O_TMPFILE`) vanishes with its process, so a kill leaves nothing behind. A
rename inside one folder is atomic: a reader sees the old file or the new one. Where a file system
has no such files, a hidden one beside the target is used; one that a killed process left there is
taken away by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rewrite.errors import CheckpointError, system_reason
from rewrite.files import publishing


def check_writable(path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Raise CheckpointError when `path` cannot become a file; touch nothing.

    Call it before expensive work, so that a typo in an output path costs nothing.
    """
    target = Path(path)
    if lacks := publishing.missing():
        raise CheckpointError(
            f"{target}: files are written on Linux and macOS alone (this Python has no {lacks}); "
            "run the command there, in WSL for example"
        )
    try:
        place = target.resolve()
        taken = os.path.lexists(place)
        kind = place.stat().st_mode if taken else stat.S_IFREG
        nameless = target.exists() and not taken  # as /dev/stdout of a command in a pipe
    except (OSError, RuntimeError, ValueError) as error:
        reason = _reason(error) if isinstance(error, OSError) else "is no path of a file"
        raise CheckpointError(f"{target}: {reason}") from error
    folder = target.parent if place.parent == target.parent.resolve() else place.parent
    if stat.S_ISDIR(kind):
        raise CheckpointError(f"{target}: is a folder; give a file name inside it")
    if nameless or not stat.S_ISREG(kind):
        raise CheckpointError(f"{target}: is a pipe or a device, not a file; give another place")
    if not folder.is_dir():
        raise CheckpointError(f"{target}: the folder {folder} does not exist; create it first")
    if publishing.is_journal(place.name):
        raise CheckpointError(f"{target}: is the name of a list of unfinished work; give another")
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

    @property
    def entry(self) -> publishing.Entry:
        """Return what is to be published, for whoever has the handle."""
        return publishing.Entry(str(self.path), str(self.place), self.overwrite)

    @property
    def published(self) -> bool:
        """Say whether the content has its name."""
        return self.place.exists() and os.path.samestat(self.place.stat(), os.fstat(self.handle))

    def close(self) -> None:
        """Let go of the content, and of its hidden name."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1
        if self.name is not None:
            self.name.unlink(missing_ok=True)
            self.name = None


@dataclass
class _StagedFolder:
    """A folder with all that is in it, and the name that it will get."""

    target: Path
    place: Path
    path: Path
    kept: contextlib.ExitStack
    inode: int
    handle: int = -1

    @property
    def entry(self) -> publishing.Entry:
        """Return what is to be published."""
        return publishing.Entry(str(self.path), str(self.place), overwrite=False)

    @property
    def published(self) -> bool:
        """Say whether the folder has its name."""
        return self.place.exists() and self.place.stat().st_ino == self.inode

    def close(self) -> None:
        """Let go of the folder, and of what is left where it was made."""
        self.kept.close()


@dataclass
class Publication:
    """The files of one command, staged and not yet published."""

    staged: list[_Staged | _StagedFolder] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def add(self, staged: _Staged | _StagedFolder) -> None:
        """Take one more; raise CheckpointError where another one gets that name."""
        if any(staged.place == other.place for other in self.staged):
            raise CheckpointError(f"{staged.target}: is written twice; give each file its place")
        self.staged.append(staged)

    def publish(self) -> tuple[Path, ...]:
        """Give every staged file its name, or none; return the targets, in their order.

        It happens in a process of its own, which goes on when this one is killed.

        Raises:
            CheckpointError: a name was taken meanwhile, or the system refuses.
        """
        return self._named(_apart)

    def publish_here(self) -> tuple[Path, ...]:
        """Do so in this process: what a kill cuts off is finished by the next writer."""
        return self._named(lambda staged: publishing.publish([one.entry for one in staged]))

    def _named(
        self, publish: Callable[[Sequence[_Staged | _StagedFolder]], None]
    ) -> tuple[Path, ...]:
        made = [staged.target for staged in self.staged]
        if not made:
            return ()
        with _undisturbed():
            try:
                publish(self.staged)
            except publishing.PublishError as error:
                named = {str(staged.place): staged.target for staged in self.staged}
                place = named.get(error.target, error.target)
                raise CheckpointError(f"{place}: {_reason(error)}") from error
            finally:
                self.close()
            self.written += made
        return tuple(made)

    def keep(self, targets: Sequence[Path]) -> None:
        """Throw away what was not published, but for these targets."""
        left_out = [staged for staged in self.staged if staged.target not in targets]
        self.staged = [staged for staged in self.staged if staged.target in targets]
        for staged in left_out:
            staged.close()

    def close(self) -> None:
        """Throw away what was not published."""
        while self.staged:
            self.staged.pop().close()


def _apart(staged: Sequence[_Staged | _StagedFolder]) -> None:
    """Publish in a process that has a session of its own, and wait for it."""
    entries = [one.entry for one in staged]
    line = json.dumps([asdict(entry) for entry in entries]).encode() + b"\n"
    process = helper(["publish"], [one.handle for one in staged if one.handle >= 0])
    if process is None:
        publishing.publish(entries)
        return
    answer = process.communicate(line)[0]
    if process.returncode == 0 and answer:
        failed = json.loads(answer)
        if failed:
            raise publishing.PublishError(failed["code"], failed["target"])
        return
    # It was killed itself: what it began is finished or taken back here.
    for folder in {one.place.parent for one in staged}:
        publishing.finish_interrupted(folder)
    if lost := [one for one in staged if not one.published]:
        raise publishing.PublishError(errno.EINTR, str(lost[0].place))


def helper(arguments: Sequence[str], handles: Sequence[int] = ()) -> subprocess.Popen[bytes] | None:
    """Start `publishing` as a script, where no signal to this command reaches it."""
    if not sys.executable or not Path(publishing.__file__).is_file():
        return None
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", publishing.__file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            pass_fds=handles, start_new_session=True, cwd="/",
        )  # fmt: skip
    except OSError:
        return None


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
def together() -> Iterator[None]:
    """Give the files that are written inside their names together, or with those of the command."""
    if _CURRENT.get() is not None:
        yield
        return
    with publication() as found:
        yield
        found.publish_here()


def publish_folder(path: Path, target: Path, kept: contextlib.ExitStack) -> None:
    """Give a folder that is complete its name, at once or with the other files of the command.

    Args:
        path: the folder, on the file system of its target.
        target: what it becomes; nothing may be there.
        kept: what to close once the folder has its name, or will never have it.

    Raises:
        CheckpointError: the name is taken, or the system refuses.
    """
    place = target.parent.resolve() / target.name
    staged = _StagedFolder(target, place, path.resolve(), kept, path.stat().st_ino)
    collected = _CURRENT.get()
    if collected is None:
        Publication([staged]).publish_here()
        return
    try:
        collected.add(staged)
    except BaseException:
        staged.close()
        raise


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
            Publication([staged]).publish_here()
        else:
            collected.add(staged)
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
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has O_TMPFILE
        staged.handle = os.open(staged.place.parent, os.O_TMPFILE | os.O_RDWR, 0o600)
        if staged.path.exists():
            return
        staged.close()
    prefix = f".{publishing.beginning(staged.place.name)}."
    _sweep(staged.place.parent, prefix)
    handle, name = tempfile.mkstemp(dir=staged.place.parent, prefix=prefix, suffix=".tmp")
    staged.handle, staged.name = handle, Path(name)
    _lock(handle)


def _sweep(folder: Path, prefix: str) -> None:
    """Take away what killed writers of the same target left: files that nobody has locked."""
    for found in folder.glob(f"{glob.escape(prefix)}*.tmp"):
        with contextlib.suppress(OSError):
            handle = os.open(found, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(handle):
                    found.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    """Take the lock of a staged file, which ends with its process; say whether it was free.

    Where the system has no locks nobody can know: it is said not to be.
    """
    if not publishing.has_locks():
        return False
    try:
        publishing.lock(handle)
    except OSError:
        return False
    return True


def _flush(staged: _Staged) -> None:
    """Bring the content to the disk, with the permissions of an ordinary file."""
    if staged.name is not None:
        # A writer may have put another file in the place of the first.
        os.close(staged.handle)
        staged.handle = os.open(staged.name, os.O_RDWR)
        _lock(staged.handle)
    os.fsync(staged.handle)
    os.fchmod(staged.handle, _mode(staged.place))


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
    if error.errno == errno.EINTR:
        return "was interrupted; nothing was written"
    if error.errno == errno.EAGAIN:
        return "another process is writing into its folder; try again"
    if error.errno == errno.EROFS:
        return "the file system is read-only"
    if error.errno == errno.EEXIST:
        return "already exists; choose another place or pass --force"
    return system_reason(error)
