"""Free memory of the computer, memory of this process, and when its garbage is collected."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path


def free_memory() -> int:
    """Return how many bytes of memory are available; 2^62 where the system does not say.

    On Linux this includes the page cache (`MemAvailable`); elsewhere only unused pages count.
    """
    with contextlib.suppress(ValueError, OSError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def used_memory() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not say."""
    return _told(1)


def private_memory() -> int:
    """Return the data segment of this process in bytes (heap and stack); 0 without /proc."""
    return _told(5)


def _told(column: int) -> int:
    """Return a column of `/proc/self/statm`, in bytes; 0 on other systems than Linux."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[column]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError, IndexError):
        return 0


@contextlib.contextmanager
def rare_collection() -> Iterator[None]:
    """Collect garbage rarely while many objects are made that stay: modules, graphs, copies.

    Each collection looks at those once more, and a full one at all of torch.
    """
    before = gc.get_threshold()
    if before[0]:  # else the program has turned it off
        gc.set_threshold(*map(max, before, (100_000, 50, 100)))
    try:
        yield
    finally:
        gc.set_threshold(*before)
