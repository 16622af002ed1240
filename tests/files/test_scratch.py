"""A scratch folder goes: at the end, on an error, and with its process at any moment."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewrite.files import scratch_folder

PROGRAM = """
import os, signal, sys
from pathlib import Path
from rewrite.files.scratch import scratch_folder
real = os.mkdir
def killed(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "at once":
    os.mkdir = killed
with scratch_folder(sys.argv[1]) as folder:
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _is_empty(folder: Path) -> bool:
    deadline = time.monotonic() + 10
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not list(folder.iterdir())


def test_a_folder_is_there_and_then_gone(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "x.") as folder:
        assert folder.is_dir() and folder.parent == tmp_path and folder.name.startswith("x.")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_text("x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="inside"), scratch_folder(tmp_path):
        raise ValueError("inside")
    assert not list(tmp_path.iterdir())


def test_the_system_says_where_no_folder_can_be(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), scratch_folder(tmp_path / "none"):
        pass


@pytest.mark.parametrize("moment", ["at once", "later"])
def test_a_folder_goes_with_its_process(tmp_path: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), moment])
    assert done.returncode == -9
    assert _is_empty(tmp_path)
