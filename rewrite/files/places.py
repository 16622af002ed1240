"""Say of the files that a command writes, before it begins, that none takes another's place.

written = {model, graph, its weights, report, page, picture}     each a place of its own
written and read = {}                                            but for a model under its own name
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from rewrite.errors import OptionError

_OWN_PAGE, _HEAD = '<meta name="generator" content="rewrite">', 500
_NODE_DATA = {"results", "gradient"}
_LARGEST = 64 << 20


def check_name(flag: str, name: str | None, *, folder: bool = False) -> None:
    """Raise OptionError for what names no file, such as a variable of a shell that is not set.

    Args:
        flag: what it was given to.
        name: what was given; None if nothing was.
        folder: whether it may be a folder.
    """
    if name == "":
        raise OptionError(f"{flag}: is empty; give it a file name")
    if name is not None and "\0" in name:
        raise OptionError(f"{flag} {name!r}: is no path of a file")
    if name is not None and name.endswith(os.sep) and not folder:
        raise OptionError(f"{flag} {name}: names a folder; give a file name inside it")


def check_distinct(named: Iterable[tuple[str, str | Path | None]]) -> None:
    """Raise OptionError where two outputs of a command are the same file."""
    taken: dict[str, str] = {}
    for flag, name in named:
        if name is None:
            continue
        place = os.path.realpath(name)
        if place in taken:
            raise OptionError(
                f"{flag} {name}: is what {taken[place]} names as well; give each file a place of "
                "its own"
            )
        taken[place] = flag


def check_not_read(flag: str, name: str | None, read: Iterable[object]) -> None:
    """Raise OptionError where what is written is a file that is read.

    Args:
        flag: what it was given to.
        name: what is written; None for nothing.
        read: files and folders that are read; what is no text is none.
    """
    if not name or not os.path.lexists(name):
        return
    for other in read:
        if not isinstance(other, str) or not other:
            continue
        if _is_same_file(other, name):
            raise OptionError(f"{flag} {name}: is {other}, which is read; give another place")
        if _is_same_file(f"{other}.data", name):
            raise OptionError(f"{flag} {name}: holds the weights of {other}; give another place")


def check_not_inside(flag: str, name: str, read: Iterable[object]) -> None:
    """Raise OptionError where a file is in a folder that is read, and no earlier report."""
    for other in read:
        if isinstance(other, str) and _is_inside(other, name) and not _is_report(Path(name)):
            raise OptionError(f"{flag} {name}: is in {other}, which is read; give another place")


def check_replaceable(flag: str, name: str) -> None:
    """Raise OptionError for a file that is no earlier report, which a new one may replace."""
    if not _is_report(Path(name)):
        raise OptionError(f"{flag} {name}: already exists; choose another place or pass --force")


def _is_report(place: Path) -> bool:
    try:
        if place.stat().st_size > _LARGEST:
            return False
        if place.suffix.lower() in (".html", ".htm"):
            return _OWN_PAGE in place.read_text(encoding="utf-8")[:_HEAD]
        if place.suffix.lower() != ".json":
            return False
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and ("provenance" in content or set(content) == _NODE_DATA)


def _is_same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def _is_inside(folder: str, name: str) -> bool:
    """Say whether a file is in a folder, at any depth."""
    try:
        return Path(folder).is_dir() and Path(name).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, ValueError, RuntimeError):
        return False
