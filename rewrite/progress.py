"""A progress line for work that takes longer than a second, on a terminal only."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.status import Status


_PATIENCE = 1.0


@dataclass(frozen=True)
class Announced:
    """Batches, whose number is shown before each is worked on."""

    source: Iterable[Any]
    say: Callable[[str], None]
    name: str

    def __iter__(self) -> Iterator[Any]:
        total = operator.length_hint(self.source)
        of = f" of {total}" if total else ""
        for number, batch in enumerate(self.source, 1):
            self.say(f"{self.name}: calibration batch {number}{of}")
            yield batch
        self.say(self.name)

    @property
    def left_out(self) -> list[str]:
        """What the source left out."""
        return list(getattr(self.source, "left_out", ()))


class ProgressLine:
    """Show the step that is running on standard error, from the second second on.

    Use as a context manager; call it with the name of each step as it begins.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._text = "starting"
        self._lock = threading.Lock()
        self._status: Status | None = None
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
                self._status.update(f"{step} …")

    def _show(self) -> None:
        from rich.console import Console

        with self._lock:
            if self._enabled:
                self._status = Console(stderr=True).status(f"{self._text} …")
                self._status.start()
