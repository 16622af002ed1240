"""A progress line for work that takes longer than a second, on a terminal only."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

_PATIENCE = 1.0


class Steps:
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

    def __enter__(self) -> Steps:
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
