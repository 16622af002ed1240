"""Where a report comes from: versions, the command line, and the files by their SHA-256."""

from __future__ import annotations

import hashlib
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
        found["command"] = " ".join(["rewrite", *command])
    for path in files:
        if Path(path).is_file():
            found[str(path)] = f"sha256 {file_hash(path)}"
    return found | versions()


def own_command() -> list[str]:
    """Return the arguments of this process."""
    return sys.argv[1:]
