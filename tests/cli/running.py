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


def refused(capture: pytest.CaptureFixture[str], words: str, *arguments: object) -> None:
    """Run a command that has to be refused in one line and to leave every file as it was."""
    before = contents()
    code, out, err = run(capture, *arguments)
    assert code == 2, (out, err)
    assert err.count("\n") == 1, err
    assert err.startswith("rewrite: ")
    assert words in err
    assert not out
    assert contents() == before


def contents() -> dict[Path, bytes | None]:
    """Return what is in the current folder: the bytes of each file, and None for what is none."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")}
