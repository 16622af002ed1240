"""What a command writes takes the place of nothing that it reads, and of nothing else it writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewrite.errors import OptionError
from rewrite.files.places import (
    check_distinct,
    check_name,
    check_not_inside,
    check_not_read,
    check_replaceable,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a model, its graph with weights beside it, and two pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("m.pt", "m.onnx", "m.onnx.data", "photos/a.png", "photos/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("old")
    return tmp_path


def test_a_name_is_one_of_a_file() -> None:
    for name, folder in ((None, False), ("a", False), ("a/", True)):
        check_name("-o", name, folder=folder)
    for name, said in (("", "is empty"), ("a/", "names a folder"), ("a\0b", "is no path")):
        with pytest.raises(OptionError, match=said):
            check_name("-o", name)


def test_two_that_are_one_are_named(here: Path) -> None:
    check_distinct([("-o", "a"), ("--report", "b"), ("--html", None)])
    Path("link").symlink_to("a")
    for other in ("a", "./x/../a", "link"):
        with pytest.raises(OptionError, match=r"--report .*: is what -o names as well"):
            check_distinct([("-o", "a"), ("--report", other)])


def test_what_is_read_is_not_written(here: Path) -> None:
    check_not_read("--report", "new.json", ["m.pt", "m.onnx", "photos", None, 3, ""])
    Path("link").symlink_to("m.pt")
    os.link("m.pt", "hard")
    for name in ("m.pt", "link", "hard"):
        with pytest.raises(OptionError, match=r"is m\.pt, which is read"):
            check_not_read("--report", name, ["m.pt"])
    with pytest.raises(OptionError, match=r"holds the weights of m\.onnx"):
        check_not_read("--report", "m.onnx.data", ["m.onnx"])


def test_what_is_in_a_folder_that_is_read_stays(here: Path) -> None:
    Path("photos/own.json").write_text('{"provenance": {}}')
    check_not_inside("--report", "photos/own.json", ["photos"])
    check_not_inside("--report", "m.pt", ["photos"])
    with pytest.raises(OptionError, match=r"photos/a\.png: is in photos, which is read"):
        check_not_inside("--plot", "photos/a.png", ["photos"])


def test_an_earlier_report_may_be_replaced(here: Path) -> None:
    Path("own.json").write_text('{"provenance": {}}')
    Path("data.json").write_text('{"results": [], "gradient": []}')
    Path("own.html").write_text('<meta name="generator" content="rewrite">')
    for name in ("own.json", "data.json", "own.html"):
        check_replaceable("--report", name)
    Path("other.json").write_text("{}")
    Path("other.html").write_text("<p>")
    Path("deep.json").write_text("[" * 100_000)
    for name in ("m.pt", "other.json", "other.html", "deep.json"):
        with pytest.raises(OptionError, match="already exists"):
            check_replaceable("--report", name)
