"""The command `rewrite compare`."""

import json
from pathlib import Path

from tests.cli.running import run


def test_compare_names_what_differs(capsys, model_here: Path) -> None:
    assert run(capsys, "convert", "--fold", "model.pt", "--input", "1x3x9x9")[0] == 0
    code, out, _ = run(capsys, "compare", "model.pt", "model.rewritten.pt", "--input", "1x3x9x9")
    assert code == 0 and "BatchNorm2d  Identity" in out and "1 of 5 modules differ" in out


def test_a_report_of_compare_says_where_it_comes_from(capsys, model_here: Path) -> None:
    assert run(capsys, "compare", "model.pt", "model.pt", "--report", "r.json")[0] == 0
    found = json.loads(Path("r.json").read_text())
    assert found["provenance"]["model.pt"].startswith("sha256 ") and len(found["after"]) == 5


def test_an_own_page_may_be_replaced_and_no_other(capsys, model_here: Path) -> None:
    command = ["compare", "model.pt", "model.pt", "--html", "page.html"]
    assert [run(capsys, *command)[0] for _ in range(2)] == [0, 0]
    Path("page.html").write_text("<!doctype html><p>somebody's own")
    assert run(capsys, *command)[0] == 2
    assert Path("page.html").read_text().endswith("somebody's own")
