"""The command `rewrite apply-map`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import models
from rewrite.cli.main import main
from tests.fold.test_replay import pooled_report, report_of, second


@pytest.fixture(scope="module")
def pooled() -> tuple[Any, dict[str, Tensor]]:
    """Return a report whose plan needs positive scales, and the state dict that it was made of."""
    return pooled_report()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("norm.running_var", -1.0, "norm.running_var is negative (-1"),
        ("norm.running_var", float("nan"), "norm.running_var holds values that are not finite"),
        ("norm.weight", 0.0, "norm.weight holds 0"),
        ("conv.weight", float("inf"), "conv.weight holds values that are not finite"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_command_refuses_a_spoiled_checkpoint_by_name_and_writes_nothing(
    pooled: tuple[Any, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    key: str, value: float, told: str, suffix: str,
) -> None:  # fmt: skip
    report, state = pooled
    state = {name: tensor.clone() for name, tensor in state.items()}
    state[key].view(-1)[1] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    torch.save(state, tmp_path / "other.pt")
    out = tmp_path / f"out.{suffix}"
    assert (
        main(["apply-map", *map(str, (tmp_path / "report.json", tmp_path / "other.pt", out))]) == 2
    )
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt", "report.json"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_command(tmp_path: Path, suffix: str) -> None:
    model, inputs = models.build("residual")
    report, _ = report_of(model, inputs)
    (tmp_path / "report.json").write_text(json.dumps(report))
    other = second("residual")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    out = tmp_path / f"folded.{suffix}"
    code = main(["apply-map", str(tmp_path / "report.json"), str(tmp_path / "other.pt"), str(out)])
    assert code == 0
    got = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    _, folded = report_of(other, inputs)
    folded.load_state_dict(got)
    with torch.no_grad():
        want = other(*inputs)
        assert torch.allclose(folded(*inputs), want, rtol=1e-10, atol=1e-12)


def test_the_same_checkpoint_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file is called while it is written."""
    model, inputs = models.build("residual")
    (tmp_path / "report.json").write_text(json.dumps(report_of(model, inputs)[0]))
    torch.save(second("residual").state_dict(), tmp_path / "other.pt")
    made = []
    for name in ("one.pt", "two.pt"):
        places = [str(tmp_path / place) for place in ("report.json", "other.pt", name)]
        assert main(["apply-map", *places]) == 0
        made.append((tmp_path / name).read_bytes())
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    assert made[0] == made[1]


def test_the_command_complains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, state = tmp_path / "report.json", tmp_path / "x.pt"
    report.write_text("no json")
    assert main(["apply-map", str(report), str(state), str(tmp_path / "out.pt")]) == 2
    assert "x.pt: no such file" in capsys.readouterr().err
    torch.save({"weight": torch.zeros(1)}, state)
    assert main(["apply-map", str(report), str(state), str(tmp_path / "out.pt")]) == 2
    assert "no report can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"passes": 3}',
        '{"passes": [3]}',
        '{"passes": [{"changes": [{"recipe": {"do": "norm"}, "keys": {}, "target": "x"}]}]}',
        '{"passes": [{"changes": [{"recipe": 7, "keys": {}, "target": "x"}]}]}',
        "[" * 100_000,
        "\xff\xfe",
    ],
    ids=range(7),
)
def test_a_report_that_is_damaged_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    names = [str(tmp_path / name) for name in ("report.json", "x.pt", "out.pt")]
    assert main(["apply-map", *names]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()
