"""A folder that appears whole or not at all.

    .NAME.partial/whole (locked) -> written, flushed -> renamed to NAME

A process of its own takes the partial folder away when the run is killed. Where that one dies too,
the folder stays, without a lock: the next run takes it away. A run never resumes: it begins anew,
and says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from rewrite.errors import CheckpointError, system_reason
from rewrite.files import publish_folder, publishing, removed_if_killed

_LOCK, _WHOLE = ".lock", "whole"
_PATIENCE = 3.0
"""Seconds to wait for the process that takes away what a killed run left."""


def check_target(target: Path) -> None:
    """Raise CheckpointError when a folder cannot appear at `target`; touch nothing."""
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: already exists; choose another place")
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{target}: the folder {target.parent} does not exist; create it first"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target}: no permission to write into {target.parent}")


@contextlib.contextmanager
def staged_folder(target: Path, notes: list[str]) -> Iterator[Path]:
    """Yield a folder beside `target` that becomes `target` when the block succeeds.

    Inside of a command it gets its name with the other files of the command.

    Raises:
        CheckpointError: the target exists or cannot be written, or another process writes it.
    """
    check_target(target)
    stage = target.parent / f".{target.name}.partial"
    try:
        with contextlib.ExitStack() as kept:
            # Before the folder is there: a kill may come as soon as it is.
            kept.enter_context(removed_if_killed(stage, _LOCK))
            kept.callback(os.close, _claim(stage, notes))
            kept.callback(shutil.rmtree, stage, ignore_errors=True)
            check_target(target)  # another process may have finished it meanwhile
            whole = stage / _WHOLE
            whole.mkdir()
            yield whole
            for path in whole.rglob("*"):
                if path.is_file():
                    _flush(path)
            check_target(target)
            publish_folder(whole, target, kept.pop_all())
    except OSError as error:
        raise CheckpointError(f"{target}: {system_reason(error)}") from error


def _claim(stage: Path, notes: list[str]) -> int:
    """Make the partial folder, or take over one that a killed run left; return the lock.

    What takes away a folder that a killed run left has it for a moment.
    """
    found, left, deadline = stage.exists(), False, time.monotonic() + _PATIENCE
    while (handle := _locked(stage)) is None:
        left = True
        if time.monotonic() > deadline:
            raise CheckpointError(f"{stage}: another process is writing it")
        time.sleep(0.02)
    held = [path for path in stage.iterdir() if path.name != _LOCK]
    if found and not publishing.has_locks():
        os.close(handle)
        raise CheckpointError(f"{stage}: another process may be writing it; if not, delete it")
    for path in held:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cut_off = "an earlier run was cut off: begun anew"
    notes.append(cut_off if left or held else "begun anew: no earlier run left anything to resume")
    return handle


def _locked(stage: Path) -> int | None:
    """Return the lock of the partial folder; None while another process has it, or removes it."""
    stage.mkdir(exist_ok=True)
    try:
        handle = os.open(stage / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        with contextlib.suppress(OSError):
            stage.rmdir()
        raise
    try:
        publishing.lock(handle)
        if os.path.samestat(os.fstat(handle), (stage / _LOCK).stat()):
            return handle
    except OSError:  # another process has it, or removed it
        os.close(handle)
        return None
    os.close(handle)
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
