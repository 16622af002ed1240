"""Where a report comes from: versions, the command line, the files by their SHA-256, places.

A report is sent to others: a place in it is relative to the folder in which the command ran or to
the one from which Python imports, and never names a home folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("rewrite", "torch", "onnx", "onnxruntime", "timm", "torchvision", "transformers")


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that takes part and is installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def shown_path(path: str) -> str:
    """Return an absolute path as a report shows it; another one as it is.

    It is relative to the deepest folder above it of those that Python imports from and the current
    one; below the home folder it begins with "~".
    """
    if not Path(path).is_absolute():
        return path
    roots = {str(Path.cwd()), *filter(None, sys.path)}
    for root in sorted(roots, key=len, reverse=True):
        if path.startswith(below := root.rstrip(os.sep) + os.sep):
            return path[len(below) :]
    home = str(Path("~").expanduser()).rstrip(os.sep) + os.sep
    return "~" + os.sep + path[len(home) :] if path.startswith(home) and home != os.sep else path


def shown_argument(argument: str) -> str:
    """Return an argument of a command line, and the value of a --flag=value, as `shown_path`."""
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={shown_path(value)}"
    return shown_path(argument)


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits, read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def provenance(
    files: Iterable[str | Path] = (), command: Sequence[str] | None = None
) -> dict[str, str]:
    """Return what reproduces a report, in the order in which it is shown.

    Args:
        files: the files that were read or written; names that are no files are left out.
        command: the command line; that of this process where it is `rewrite`'s own.
    """
    found: dict[str, str] = {}
    if command is not None:
        found["command"] = " ".join(["rewrite", *map(shown_argument, command)])
    for path in files:
        if os.path.lexists(path) and Path(path).is_file():
            found[shown_path(str(path))] = f"sha256 {file_hash(path)}"
    return found | versions()


def own_command() -> list[str]:
    """Return the arguments of this process."""
    return sys.argv[1:]
