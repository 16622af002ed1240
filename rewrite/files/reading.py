"""Say what a path is, before anything waits for it: a pipe or a device may never end.

regular file -> read        folder, pipe, socket, device -> refused
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def is_there(path: str | os.PathLike[str]) -> bool:
    """Say whether there is a file or a folder; a text that can be no path is none."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Say whether a path is a folder, through links; a text that can be no path is none."""
    return is_there(path) and Path(path).is_dir()


def named_twice(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Return the key that an object of a JSON file has most often, None if each stands once.

    A reader of JSON keeps the last of two keys of one name.
    """
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    return name if count > 1 else None
