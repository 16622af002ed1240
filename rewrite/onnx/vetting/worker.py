"""Call native code in a thread of its own: a deadline, too much memory, and Ctrl-C end the wait.

Python handles a signal in its main thread alone, and only between two of its own instructions. So
the main thread waits in steps, while a daemon thread is inside of onnx or onnxruntime, which let
other threads run. Nobody waits for a call that was given up: it ends with the
process, if not before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rewrite.errors import VerificationError
from rewrite.memory import free_memory, used_memory

T = TypeVar("T")


SECONDS, SECONDS_A_MEGABYTE = 60.0, 1.0
"""How long a graph may take to be judged or built: more for larger ones."""

LEAST_BYTES = 1 << 30
"""What a call may take at the least, however little memory is free."""

_STEP, _LOOK_EVERY = 0.02, 10


class EndlessError(VerificationError):
    """A call took more time or memory than it may take, and was given up."""


def deadline(nbytes: int) -> float:
    """Return how many seconds judging or building a graph of so many bytes may take."""
    return SECONDS + SECONDS_A_MEGABYTE * nbytes / 1e6


def call(function: Callable[[], T], seconds: float, what: str, advice: str) -> T:
    """Return what a function returns, called in a thread of its own.

    Args:
        function: it spends its time in native code, which lets other threads run.
        seconds: how long it may take.
        what: how an error begins: what does not end.
        advice: how an error ends: what to look for.

    Raises:
        EndlessError: it took longer, or more than half of the memory that was free.
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

    most = max(free_memory() // 2, LEAST_BYTES)
    before, begin, looks = used_memory(), time.monotonic(), 0
    threading.Thread(target=body, daemon=True).start()
    while not ended.wait(_STEP):
        looks += 1
        if time.monotonic() - begin > seconds:
            raise EndlessError(
                f"{what} did not end within {seconds:.0f} s and was stopped; {advice}"
            )
        if looks % _LOOK_EVERY == 0 and (taken := used_memory() - before) > most:
            raise EndlessError(
                f"{what} took {taken / 2**30:.1f} GiB of memory, where {most / 2**30:.1f} GiB were "
                f"to be had, and was stopped; {advice}"
            )
    result, error = outcome[0]
    if error is not None:
        raise error
    returned: T = result
    return returned
