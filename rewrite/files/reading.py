"""Say what a path is, before anything waits for it: a pipe or a device may never end.

regular file -> read        folder, pipe, socket, device -> refused
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def no_file(path: str | os.PathLike[str]) -> str:
    """Return what is wrong with a path that is to be read, as "is a pipe, not a file".

    "" for a regular file, through links, and for what is not there: opening that says why.
    """
    try:
        kind = stat.S_IFMT(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return ""
    return f"is {_KINDS[kind]}, not a file" if kind in _KINDS else ""
