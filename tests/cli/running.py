"""Run a command in this process, and say what it printed and left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewrite.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return the exit code of a command, and what it wrote to stdout and to stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(str(stop.code or 0))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def files(folder: Path) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}
