"""`rewrite inspect --path-norm` and `--balance`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from rewrite.cli.main import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    rewrite.save(model.eval(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_path_norm_prints_what_the_function_returns(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = checkpoint.with_name("norms.json")
    arguments = ["inspect", "--path-norm", str(checkpoint), "--input", "1x3x8x8"]
    assert main([*arguments, "--report", str(report)]) == 0
    (row,) = json.loads(report.read_text())["path_norms"]
    x = torch.zeros(1, 3, 8, 8)
    expected = rewrite.path_norm(rewrite.load(str(checkpoint)), 2, x)
    assert row["path_norm"]["2"] == expected
    assert set(row["path_norm"]) == {"1", "2", "inf"}
    assert f"{expected:.6g}" in capsys.readouterr().out


def test_balance_prints_groups_and_draws_them(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = checkpoint.with_name("balance.svg")
    arguments = ["inspect", "--balance", str(checkpoint), "--input", "1x3x8x8"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "factor that would balance" in out and "outputs: 1" in out
    assert picture.exists()


def test_an_input_that_does_not_fit_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--path-norm", str(checkpoint), "--input", "1x5x8x8"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the model does not run on the input: " in said
