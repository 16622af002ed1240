"""The command `rewrite passes`."""

from __future__ import annotations

from tests.cli.running import run


def test_passes_lists_options_and_contracts(capsys) -> None:
    code, out, _ = run(capsys, "passes")
    assert code == 0 and "bn-to-gn" in out and "approximate" in out
    code, out, _ = run(capsys, "passes", "bn-to-gn")
    assert code == 0 and "approximate" in out and "--num-groups" in out


def test_one_pass_is_shown_with_its_options_and_an_example(capsys) -> None:
    code, out, _ = run(capsys, "passes", "bn-to-gn")
    assert code == 0 and "--num-groups (int" in out and "rewrite convert --bn-to-gn" in out
    assert "rewrite convert --reinit" in run(capsys, "passes", "reinit")[1]
