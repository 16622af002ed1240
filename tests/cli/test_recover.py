"""The command `rewrite recover`, and `rewrite convert --recover`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rewrite
from rewrite.cli.main import main


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(40, 1, 6, 6)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=model(x).argmax(1).numpy())
    return tmp_path


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(files / "model.pt"), str(files / "data.npz")
    assert main(["convert", "--bn-to-gn", "--num-groups", "4", model, "--quiet"]) == 0
    student = str(files / "model.rewritten.pt")
    report, plot = files / "r.json", files / "p.svg"
    arguments = ["recover", student, "--teacher", model, "--data", data]
    assert main([*arguments, "--labels", "--report", str(report), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "same top-1" in shown and "student after: calibration error" in shown
    assert isinstance(rewrite.load(str(files / "model.rewritten.recovered.pt"))[1], nn.GroupNorm)
    assert '"agreements"' in report.read_text() and "<svg" in plot.read_text()
    assert main(arguments) == 2 and "recovered.pt" in capsys.readouterr().err
    assert main([*arguments, "-o", str(files / "no" / "such" / "out.pt")]) == 2
    assert main([*arguments, "--force", "--smoothing", "much"]) == 2
    assert main(["recover", student, "--teacher", model, "--data", "nothing", "--force"]) == 2
    assert all(line.startswith("rewrite: ") for line in capsys.readouterr().err.splitlines())


def test_convert_recovers_in_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(files / "model.pt"), str(files / "data.npz")
    assert main(["convert", "--bn-to-gn", model, "--recover", data]) == 0
    assert "recovered: same top-1 on" in " ".join(capsys.readouterr().out.split())
