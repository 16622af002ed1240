"""How much memory of the computer is free."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def free_memory() -> int:
    """Return how many bytes of memory are to be had; where the system does not tell, very many.

    Linux counts what it only keeps of files as to be had, other systems what nobody uses.
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
    """Return how many bytes of memory this process holds; 0 where the system does not tell."""
    return _told(1)


def private_memory() -> int:
    """Return how many bytes this process has reserved for itself; 0 where the system says not."""
    return _told(5)


def _told(column: int) -> int:
    """Return a column of what Linux tells of this process, in bytes; 0 elsewhere."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[column]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError, IndexError):
        return 0
