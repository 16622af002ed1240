"""Call native code in a thread of its own: a deadline, too much memory, and Ctrl-C end the wait.

Python handles a signal in its main thread alone, and only between two of its own instructions. So
the main thread waits in steps, while a daemon thread is inside of onnx or onnxruntime, which let
other threads run. Nobody waits for a call that was given up: it ends with the
process, if not before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rewrite.errors import VerificationError
from rewrite.memory import free_memory, private_memory, used_memory

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]  # nothing bounds a process there

T = TypeVar("T")


SECONDS, SECONDS_A_MEGABYTE = 60.0, 1.0
"""How long a graph may take to be judged or built: more for larger ones."""

LEAST_BYTES = 1 << 30
"""What a call may take at the least, however little memory is free."""

PATIENCE = 60.0
"""How much longer a call may take that does not get the processor for as long as it may take."""

_STEP, _TO_STOP = 0.02, 10.0

_REFUSED = ("std::bad_alloc", "Failed to allocate memory")
"""What native code says where the system gives it no memory."""

_CEILING = 2
"""Allocators reserve up to twice of what they use."""


class EndlessError(VerificationError):
    """A call took more time or memory than it may take, and was given up."""


def deadline(nbytes: int) -> float:
    """Return how many seconds judging or building a graph of so many bytes may take."""
    return SECONDS + SECONDS_A_MEGABYTE * nbytes / 1e6


@dataclass(frozen=True)
class Limits:
    """What a call may take: seconds of the clock and of the processor, and bytes of memory.

    Without `nbytes` it is half of what is free.
    """

    seconds: float
    nbytes: int | None = None


def call(
    function: Callable[[], T],
    limits: Limits,
    what: str,
    advice: str,
    stop: Callable[[], None] | None = None,
) -> T:
    """Return what a function returns, called in a thread of its own.

    Args:
        function: it spends its time in native code, which lets other threads run.
        limits: what it may take.
        what: how an error begins: what does not end.
        advice: how an error ends: what to look for.
        stop: tells native code to end, where it can be told; it is waited for then.

    Raises:
        EndlessError: it took longer, or more memory.
    """
    outcome: list[Any] = []
    ended = threading.Event()

    def body() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # noqa: BLE001 (the caller raises it)
            outcome.append((None, error))
        finally:
            ended.set()

    with _ceiling(limits.nbytes):
        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        try:
            _wait(ended, limits, what, advice)
        except BaseException:
            if stop is not None:
                stop()
                # A thread that comes back from native code while Python ends, aborts the process.
                thread.join(_TO_STOP)
            raise
    result, error = outcome[0]
    if isinstance(error, MemoryError) or any(text in str(error) for text in _REFUSED):
        raise EndlessError(f"{what} asked for too much memory at once; {advice}") from error
    if error is not None:
        raise error
    returned: T = result
    return returned


def _wait(ended: threading.Event, limits: Limits, what: str, advice: str) -> None:
    most = max(free_memory() // 2, LEAST_BYTES) if limits.nbytes is None else limits.nbytes
    before, begin, worked = used_memory(), time.monotonic(), time.process_time()
    while not ended.wait(_STEP):
        late = time.monotonic() - begin - limits.seconds
        if late > PATIENCE or (late > 0 and time.process_time() - worked > limits.seconds):
            raise EndlessError(
                f"{what} did not end within {limits.seconds:.0f} s and was stopped; {advice}"
            )
        if (taken := used_memory() - before) > most:
            raise EndlessError(
                f"{what} took {taken / 2**30:.1f} GiB of memory, where {most / 2**30:.1f} GiB were "
                f"to be had, and was stopped; {advice}"
            )


@contextmanager
def _ceiling(nbytes: int | None) -> Iterator[None]:
    """Let the system refuse what is far beyond a limit, where that hits no other thread.

    A value that is asked for at once is filled before anybody could look.
    """
    if nbytes is None or resource is None or threading.active_count() > 1:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = private_memory() + _CEILING * nbytes
    if (soft != resource.RLIM_INFINITY and wanted >= soft) or not private_memory():
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
