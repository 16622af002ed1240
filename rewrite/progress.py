"""A progress line for work that takes longer than a second, on a terminal only.

    time left = time since the first step began / steps done · steps to do

It is said where the number of steps is known, from the second second and the second step on.
"""

from __future__ import annotations

import operator
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress


_PATIENCE = 1.0


Item = TypeVar("Item")


@dataclass
class Countdown:
    """Says which of a number of steps begins, and how long those that are left will take.

    Call it as each step begins: "verifying: given, 3 of 8, about 12 s left".

    Attributes:
        say: shows a line.
        what: names the work.
        total: how many steps there are; 0 if that is not known.
        clock: the time in seconds.
    """

    say: Callable[[str], None]
    what: str
    total: int
    clock: Callable[[], float] = time.monotonic
    _begun: float = field(default=0.0, init=False)
    _number: int = field(default=0, init=False)

    def __call__(self, name: str = "") -> None:
        """Say that the next step begins."""
        now = self.clock()
        if not self._number:
            self._begun = now
        done, self._number = self._number, self._number + 1
        of = f" of {self.total}" if self.total >= self._number else ""
        passed, left = now - self._begun, ""
        if done and of and passed >= _PATIENCE:
            left = f", about {duration(passed / done * (self.total - done))} left"
        named = f": {name}," if name else ""
        self.say(f"{self.what}{named} {self._number}{of}{left}")


def counted(
    items: Iterable[Item], say: Callable[[str], None], what: str, total: int | None = None
) -> Iterator[Item]:
    """Yield the items and say before each which it is and how long the rest will take."""
    known = operator.length_hint(items) if total is None else total
    step = Countdown(say, what, known)
    for item in items:
        step()
        yield item


def duration(seconds: float) -> str:
    """Return a time to wait in words: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Announced:
    """Batches, whose number is shown before each is worked on."""

    source: Iterable[Any]
    say: Callable[[str], None]
    name: str

    def __iter__(self) -> Iterator[Any]:
        yield from counted(self.source, self.say, f"{self.name}: calibration batch")
        self.say(self.name)

    @property
    def left_out(self) -> list[str]:
        """What the source left out."""
        return list(getattr(self.source, "left_out", ()))


class ProgressLine:
    """Show the step that is running, and since when, on standard error from the second second on.

    Use as a context manager; call it with the name of each step as it begins.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._text = "starting"
        self._lock = threading.Lock()
        self._status: Progress | None = None
        self._timer = threading.Timer(_PATIENCE, self._show)
        self._timer.daemon = True

    def __enter__(self) -> ProgressLine:
        if self._enabled:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with self._lock:
            self._enabled = False
            self._timer.cancel()
            if self._status is not None:
                self._status.stop()

    def __call__(self, step: str) -> None:
        """Name the step that begins now."""
        with self._lock:
            self._text = step
            if self._status is not None:
                self._status.update(self._status.task_ids[0], description=f"{step} …")

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
        with self._lock:
            if self._enabled:
                shown = Progress(
                    *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True
                )
                shown.add_task(f"{self._text} …", total=None)
                self._status = shown
                shown.start()
