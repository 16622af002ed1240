"""Commands that are killed, or refused the disk, leave what was there or what was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("command", ["apply-map", "compare", "convert a folder"])
def test_targets_are_old_or_new_and_nothing_else_is_left(command) -> None:
    """A few of the runs of `benchmarks.kills`, which exits with 1 when one of them is wrong."""
    arguments = [sys.executable, "-m", "benchmarks.kills", command, "--kills=8", "--refusals=8"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
