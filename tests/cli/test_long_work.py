"""Every command that may take long says its steps, and of how many where that is known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from rewrite.cli.main import main
from tests.sharded.conftest import Make

_STEPS = {
    "convert --bn-to-gn --keep function --calibration x.npz --onnx out.onnx -o out.pt model.pt": (
        "loading", "calibration batch 1 of", "verifying", "exporting", "saving",
    ),
    "verify model.pt model.pt": ("loading", r"verifying: .+, 2 of \d+"),
    "verify --quick model.onnx model.pt": ("verifying the graph",),
    "export model.pt out.onnx": ("exporting and verifying",),
    "inspect --signal model.pt": ("one forward", "layer 1 of 2", "layer 2 of 2"),
    "compare model.pt model.pt": ("loading", "first model", "second model", "nearest value"),
    "recover student.pt --teacher model.pt --data x.npz --epochs 2 -o out.pt": (
        "loading", r"step 1 of 4", r"step 4 of 4",
    ),
    "apply-map report.json model.pt out.safetensors": ("reading", "applying", "saving"),
}  # fmt: skip


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what progress lines are told, whether or not there is a terminal."""
    steps: list[str] = []
    monkeypatch.setattr(
        "rewrite.progress.ProgressLine.__call__", lambda self, step: steps.append(step)
    )
    return steps


@pytest.mark.parametrize("command", _STEPS, ids=lambda command: command.split(" model")[0])
def test_a_command_says_its_steps_in_their_order(
    command: str, model_here: Path, said: list[str]
) -> None:
    np.savez("x.npz", x=np.random.default_rng(0).normal(size=(4, 3, 9, 9)).astype("f4"))
    if "model.onnx" in command:
        assert main(["export", "--quiet", "model.pt", "model.onnx", "--input", "2x3x9x9"]) == 0
    if "student.pt" in command:
        swap = ["convert", "--bn-to-gn", "--quiet", "model.pt", "-o", "student.pt"]
        assert main([*swap, "--input", "2x3x9x9"]) == 0
    if "report.json" in command:
        assert main(["convert", "--fold", "--quiet", "--report", "report.json", "model.pt"]) == 0
    given = [] if command.startswith(("apply-map", "recover")) else ["--input", "2x3x9x9"]
    said.clear()
    assert main([*command.split(), *given]) == 0
    left = iter(said)
    for wanted in _STEPS[command]:
        assert any(re.search(wanted, step) for step in left), (wanted, said)


def test_a_folder_says_its_blocks(make: Make, said: list[str]) -> None:
    source = make()
    assert main(["convert", "--fold", str(source), "-o", str(source.with_name("out"))]) == 0
    assert any(re.search(r"\d+ of \d+", step) for step in said), said
