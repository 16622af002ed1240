"""`rewrite convert` of a checkpoint folder."""

from __future__ import annotations

from typing import Any

import pytest

import rewrite
from rewrite.cli.main import main
from tests.cli.running import run
from tests.sharded.conftest import Make, logits, transformers
from tests.sharded.test_streams import relative


@pytest.mark.parametrize("place", [".", ".."])
def test_a_folder_by_its_short_name_is_no_traceback(capsys, tmp_path, monkeypatch, place) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    code, _, err = run(capsys, "convert", "--fold", place)
    assert code == 2 and "config.json" in err and err.count("\n") == 1


def test_the_command_converts_inspects_and_loads(make: Make, capsys: Any) -> None:
    source = make()
    out = source.with_name("out")
    assert main(["convert", "--fold", str(source), "-o", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert main(["convert", "--fold", str(source), "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert isinstance(rewrite.load(out), transformers.LlamaForCausalLM)


def test_a_dry_run_writes_nothing(make: Make, capsys: Any) -> None:
    source = make()
    assert main(["convert", "--fold", "--dry-run", str(source)]) == 0
    assert "5 rewritten" in capsys.readouterr().out
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_from_the_command_line(make: Make) -> None:
    source = make()
    out = source.with_name("out")
    assert main(["convert", "--fold", "--rotate-stream", str(source), "-o", str(out)]) == 0
    assert relative(logits(source), logits(out)) < 1e-5
