"""A report is read as JSON of a known form, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewrite.errors import CheckpointError
from rewrite.fold.report_file import read_report


def test_a_report_is_what_its_file_says(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"passes": [{"pass": "fold"}], "seed": 1}')
    assert read_report(tmp_path / "r.json") == {"passes": [{"pass": "fold"}], "seed": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passes": {}}', "[" * 100_000, "\udcff", "NaN"])
def test_what_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="report") as caught:
        read_report(tmp_path / "r.json")
    assert "\n" not in str(caught.value)


def test_what_is_too_long_or_never_ends(tmp_path: Path) -> None:
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(CheckpointError, match="too long"):
        read_report(tmp_path / "r.json")
    os.mkfifo(tmp_path / "p.json")
    with pytest.raises(CheckpointError, match="a pipe"):
        read_report(tmp_path / "p.json")
    with pytest.raises(CheckpointError, match="no such file"):
        read_report(tmp_path / "none.json")
