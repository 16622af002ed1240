"""Folders for scratch files, which go when their process is killed.

    helper for a name -> folder of that name -> work -> folder gone -> helper gone

The helper is a process of its own and is there first: a kill may come as soon as the folder is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rewrite.files import staging


@contextlib.contextmanager
def removed_if_killed(folder: Path, lock: str = ".lock") -> Iterator[None]:
    """See to it that `folder` goes when this process is killed inside of the block.

    Args:
        folder: a folder that this process writes, or is going to make.
        lock: the file in it that this process may have locked; who locks it next has the folder.
    """
    process = staging.helper(["discard", str(folder.resolve()), lock])
    try:
        yield
    finally:
        if process is not None:
            process.communicate(b"done\n")


@contextlib.contextmanager
def scratch_folder(
    parent: str | os.PathLike[str] | None = None, prefix: str = "rewrite."
) -> Iterator[Path]:
    """Yield an empty folder that is gone afterwards, also when this process is killed.

    Args:
        parent: where it is made; by itself where the system keeps temporary files.
        prefix: how its name begins.

    Raises:
        OSError: the system makes no folder there.
    """
    folder = Path(parent or tempfile.gettempdir()).absolute() / f"{prefix}{secrets.token_hex(8)}"
    with removed_if_killed(folder):
        folder.mkdir(0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
