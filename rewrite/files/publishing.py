"""Give staged files their names, together, in a process that a killed command leaves running.

    prepared: journal written; hidden names of the new files, second names of the old ones
    committed: the journal is renamed; new -> target, one after the other
    done: second names and journal go

A rename is atomic, several are not. So the command hands its files, which have no names yet, to a
process of its own (this file, run as a script) that no signal to the command reaches: killed before
that, nothing has happened; killed later, all of it happens. Where that process dies too (power,
memory), the journal in the folder says what is to be done, and whoever writes there next does it: a
prepared publication is taken back, a committed one completed, one that failed undone.

A journal names files of its own folder alone; a publication over several folders has one in each.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]  # no such module on Windows

PREPARED, COMMITTED, UNDOING = ".rewrite-prepared", ".rewrite-committed", ".rewrite-undoing"
"""The journal's name in a folder says what is to be done about what it lists."""

_PATIENCE = 10.0
_LARGEST = 1 << 20


def has_locks() -> bool:
    """Say whether this system lets a process lock a file until it ends."""
    return fcntl is not None


def is_journal(name: str) -> bool:
    """Say whether a file of this name would be read as a journal, and taken away."""
    return name in (PREPARED, COMMITTED, UNDOING)


def beginning(name: str) -> str:
    """Return as much of a file's name as leaves room for more: names have at most 255 bytes."""
    return os.fsencode(name)[:200].decode(sys.getfilesystemencoding(), "ignore")


def missing() -> str:
    """Name what this system lacks of what publishing needs, "" if nothing: Windows lacks it."""
    needed = [(os, "O_DIRECTORY"), (os, "O_NOFOLLOW"), (os, "fchmod"), (os, "geteuid")]
    needed += [(signal, "pthread_sigmask"), (signal, "SIGHUP")]
    return ", ".join(
        f"{where.__name__}.{name}" for where, name in needed if not hasattr(where, name)
    )


def lock(handle: int) -> None:
    """Take the lock of an open file, where the system has locks.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file system has none.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class Entry:
    """A staged file or folder: where its content is, and what it becomes."""

    content: str
    target: str
    overwrite: bool


@dataclass(frozen=True)
class _Step:
    """One line of a journal; all names are of files in the journal's folder."""

    target: str
    new: str
    old: str | None
    inode: int
    overwrite: bool


class PublishError(OSError):
    """What the system refused, and for which target."""

    def __init__(self, code: int, target: str) -> None:
        super().__init__(code, os.strerror(code))
        self.target = target


def publish(entries: Sequence[Entry]) -> None:
    """Give every staged file its name, or none.

    Raises:
        PublishError: a name was taken meanwhile, or the system refuses; all is as it was.
    """
    folders = sorted({Path(entry.target).parent for entry in entries})
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(_locked(folder, entries[0].target))
            _recover(folder)
        if len(entries) == 1 and not os.path.lexists(entries[0].target):
            _link_alone(entries[0])
        else:
            _publish_all(entries)
        for folder in folders:
            with contextlib.suppress(OSError):
                _flush(folder)


def _link_alone(entry: Entry) -> None:
    """Give one file a name that nobody has: a single step."""
    try:
        _link(entry.content, Path(entry.target))
    except OSError as error:
        raise PublishError(error.errno or errno.EIO, entry.target) from error


def _publish_all(entries: Sequence[Entry]) -> None:
    steps = [(Path(entry.target).parent, _step(entry), entry) for entry in entries]
    journals: dict[Path, list[_Step]] = {}
    for folder, step, _ in steps:
        journals.setdefault(folder, []).append(step)
    at = entries[0].target
    try:
        for folder, listed in journals.items():
            at = str(folder / listed[0].target)
            _write(folder / PREPARED, listed)
        for folder, step, entry in steps:
            at = entry.target
            _link(entry.content, folder / step.new)
            if step.old is not None:
                os.link(at, folder / step.old, follow_symlinks=False)
        for folder in journals:
            _move(folder, PREPARED, COMMITTED)
        for folder, step, entry in steps:
            at = entry.target
            _rename(folder, step)
    except OSError as error:
        _take_back(list(journals))
        raise PublishError(error.errno or errno.EIO, at) from error
    for folder in journals:
        with contextlib.suppress(OSError):
            # What is left over is not what was asked for: the next run takes it away.
            _recover(folder)


def _step(entry: Entry) -> _Step:
    name = Path(entry.target).name
    hidden = f".{beginning(name)}.{secrets.token_hex(6)}"
    old = f"{hidden}.old" if os.path.lexists(entry.target) else None
    inode = Path(entry.content).stat().st_ino
    return _Step(name, f"{hidden}.tmp", old, inode, entry.overwrite)


def _take_back(folders: Sequence[Path]) -> None:
    """Put back what was there before; what the system refuses now, the next run does."""
    for folder in folders:
        with contextlib.suppress(OSError):
            if os.path.lexists(folder / COMMITTED):
                _move(folder, COMMITTED, UNDOING)
    for folder in folders:
        with contextlib.suppress(OSError):
            _recover(folder)


def finish_interrupted(folder: Path) -> bool:
    """Finish what a publication left in a folder when it was cut off; say whether there was one."""
    if not any(os.path.lexists(folder / name) for name in _DOING):
        return False
    with _locked(folder, str(folder)):
        _recover(folder)
    return True


def _recover(folder: Path) -> None:
    """Do what the journals of a folder say, and take them away; it may be done twice."""
    for name, do in _DOING.items():
        journal = folder / name
        if not os.path.lexists(journal):
            continue
        for step in _read(journal):
            do(folder, step)
            for left in (step.new, step.old):
                if left is not None:
                    _remove(folder / left)
        journal.unlink(missing_ok=True)


def _rename(folder: Path, step: _Step) -> None:
    """Give the new content its name."""
    if (folder / step.new).is_dir():
        if os.path.lexists(folder / step.target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        (folder / step.new).rename(folder / step.target)
    elif step.overwrite:
        (folder / step.new).replace(folder / step.target)
    else:
        # A hard link fails when the name is taken, which a rename does not.
        os.link(folder / step.new, folder / step.target)


def _complete(folder: Path, step: _Step) -> None:
    """Rename what was not renamed yet; a name that somebody took meanwhile stays theirs."""
    if os.path.lexists(folder / step.new):
        with contextlib.suppress(FileExistsError):
            _rename(folder, step)


def _restore(folder: Path, step: _Step) -> None:
    """Put the old file back, or take the new one away."""
    target = folder / step.target
    if step.old is None:
        if os.path.lexists(target) and target.lstat().st_ino == step.inode:
            _remove(target)
    elif os.path.lexists(folder / step.old):
        (folder / step.old).replace(target)


def _nothing(folder: Path, step: _Step) -> None:
    """Nothing was renamed yet, so only hidden names are to go."""


_DOING = {UNDOING: _restore, COMMITTED: _complete, PREPARED: _nothing}


def _write(journal: Path, steps: Sequence[_Step]) -> None:
    text = json.dumps([asdict(step) for step in steps]).encode()
    handle = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        journal.unlink()
        raise


def _read(journal: Path) -> list[_Step]:
    """Return what a journal lists; of one that is cut short or not this user's, nothing."""
    found = journal.lstat()
    ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    if not ours or found.st_size > _LARGEST:
        return []
    try:
        steps = [_Step(**line) for line in json.loads(journal.read_bytes())]
    except (ValueError, TypeError, RecursionError):
        return []
    return [step for step in steps if _sound(step)]


def _sound(step: _Step) -> bool:
    """Say whether a line names a file of its folder, and hidden ones as `_step` calls them."""
    names = [step.target, step.new, *([] if step.old is None else [step.old])]
    if not all(isinstance(name, str) and "\0" not in name for name in names):
        return False
    hidden = re.compile(rf"\.{re.escape(beginning(step.target))}\.[0-9a-f]{{12}}\.(tmp|old)")
    plain = step.target not in ("", ".", "..") and step.target == Path(step.target).name
    return plain and all(hidden.fullmatch(name) for name in names[1:])


def _move(folder: Path, old: str, new: str) -> None:
    (folder / old).replace(folder / new)
    _flush(folder)


def _link(content: str, name: Path) -> None:
    """Give a file one more name, a folder another; raise FileExistsError when it is taken."""
    if Path(content).is_dir():
        Path(content).rename(name)
        return
    folder = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # A folder's handle makes this linkat(2), which follows the link in /proc.
        os.link(content, name.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path, target: str) -> Iterator[None]:
    """Let one process at a time publish into a folder; a lock ends with its process."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PublishError(error.errno or errno.EIO, target) from error
    begin = time.monotonic()
    try:
        while True:
            try:
                lock(handle)
                break
            except BlockingIOError as error:
                if time.monotonic() - begin > _PATIENCE:
                    raise PublishError(errno.EAGAIN, target) from error
                time.sleep(0.01)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(handle)


def answer(line: bytes) -> bytes:
    """Do what one line of a command asks for, and say what came of it."""
    try:
        publish([Entry(**entry) for entry in json.loads(line)])
    except PublishError as error:
        return json.dumps({"code": error.errno, "target": error.target}).encode()
    return b"{}"


def discard(folder: Path, lock_name: str) -> None:
    """Take a folder away, unless somebody else has the lock in it by now."""
    with contextlib.suppress(OSError):
        handle = -1
        if (folder / lock_name).exists():
            handle = os.open(folder / lock_name, os.O_RDWR)
            _wait_for_lock(handle)
        shutil.rmtree(folder, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def _wait_for_lock(handle: int) -> None:
    """Take a lock whose holder is just ending: its pipes may close before its locks do."""
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            lock(handle)
            return
        time.sleep(0.01)
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def main(arguments: Sequence[str]) -> None:
    """Publish what the command asks for; or take a folder away unless the command says it is done.

    A line without an end comes from a command that was killed.
    """
    line = sys.stdin.buffer.readline()
    if arguments[0] == "publish" and line.endswith(b"\n"):
        sys.stdout.buffer.write(answer(line))
    elif arguments[0] == "discard" and not line:
        discard(Path(arguments[1]), arguments[2])


if __name__ == "__main__":
    main(sys.argv[1:])
