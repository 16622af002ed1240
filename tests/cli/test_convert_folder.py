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


def test_a_folder_in_the_place_of_a_scheme_is_told_so(make: Make, capsys: Any) -> None:
    source = make()
    capsys.readouterr()
    assert main(["convert", "--reinit", str(source)]) == 2
    error = capsys.readouterr().err
    assert f"--reinit SCHEME {source}" in error and error.count("\n") == 1
    assert main(["convert", "--reinit", "heh", str(source)]) == 2
    assert "SCHEME" not in capsys.readouterr().err


def test_a_gguf_file_says_what_to_give_instead(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    for given in (tmp_path, tmp_path / "model.gguf"):
        assert main(["convert", "--fold", str(given)]) == 2
        error = capsys.readouterr().err
        assert "GGUF" in error and "give" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
