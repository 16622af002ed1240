"""Faults for `benchmarks.kills`: a signal, or an error of the system, at a random point."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

_CODES = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS)

WATCHED = frozenset({"open", "os.rename", "os.link", "os.remove", "subprocess.Popen", "os.mkdir"})
"""Events of Python (PEP 578) at which a command may be killed."""


class Run(Protocol):
    """What a fault has to know of the command that it is for."""

    events: int
    new: dict[str, Any]
    folder: Path


class _Later:
    """A signal after some of the time that the command takes."""

    def __init__(self, share: float, number: int) -> None:
        self._share, self.signal = share, number

    def after(self, seconds: float) -> float:
        """Return how many seconds to wait."""
        return self._share * seconds

    def __call__(self, *_: Any) -> None:
        """Arm nothing in the command."""


def killed(draw: random.Random, number: int, trial: Run) -> Callable[..., None]:
    """Return a kill at a random moment, or at a random event."""
    how = (signal.SIGKILL, signal.SIGTERM)[number // 2 % 2]
    if draw.random() < 0.5:
        return _Later(draw.random() * 1.05, how)
    # The last ones are where files get their names.
    at = draw.randint(trial.events - 12 if draw.random() < 0.7 else 1, trial.events)

    def arm(*_: Any) -> None:
        _at_event(at, lambda _: os.kill(os.getpid(), how), WATCHED)

    return arm


def refused(draw: random.Random, number: int, trial: Run) -> Callable[..., None]:
    """Return an error of the system at a random event that writes, or a limit of a file's size."""
    largest = max(len(c) for c in trial.new.values() if isinstance(c, bytes))
    if number % 4 == 0:
        limit = draw.randint(0, largest)

        def limited(*_: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return limited
    code, at, here = draw.choice(_CODES), draw.randint(1, 24), number % 4 == 1

    def refuse(_: str) -> None:
        raise OSError(code, os.strerror(code))

    def arm(*_: Any) -> None:
        if here:  # in this process, where the hook sees what gives files their names
            from rewrite.files import staging

            staging.helper = lambda *_: None
        _at_event(at, refuse, WATCHED - {"os.remove"}, str(trial.folder))
        _at_flush(at, refuse)

    return arm


def _at_event(
    at: int, do: Callable[[str], None], events: frozenset[str], folder: str | None = None
) -> None:
    """Do something at an event's n-th time; with a folder, only those that write into it count."""
    seen = 0

    def hook(event: str, details: Any) -> None:
        nonlocal seen
        if event not in events or (folder is not None and not _writes(event, details, folder)):
            return
        seen += 1
        if seen == at:
            do(event)

    sys.addaudithook(hook)


def _writes(event: str, details: Any, folder: str) -> bool:
    if event == "open":
        path, _, flags = details
        written = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        place = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        inside = place.startswith((folder, "/proc/self/fd")) or not place.startswith("/")
        return bool(written) and inside
    return True


def _at_flush(at: int, do: Callable[[str], None]) -> None:
    """Do something at the n-th flush of a file, which is no event."""
    real, seen = os.fsync, 0

    def flush(fd: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at % 5:
            do("fsync")
        real(fd)

    os.fsync = flush
