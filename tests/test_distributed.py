"""The command line in several processes, and while it reads calibration data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
import rewrite
from rewrite.cli.main import main
from rewrite.distributed import process_group
from rewrite.progress import Announced


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    path = tmp_path / "model.pt"
    torch.save(models.randomize_norms_(model).double(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 40 images: three batches, one image in the second of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        colour = random.integers(0, 200, 3)
        values = (random.integers(0, 55, (12, 12, 3)) + colour).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{number:02}.png")
    (folder / "20.png").write_bytes(b"no image")
    return folder


def command(checkpoint: Path, photos: Path, name: str) -> list[str]:
    return [
        "convert", "--bn-to-gn", "--num-groups", "2", "--keep", "function",
        "--calibration", str(photos), "--size", "12", str(checkpoint),
        "-o", str(checkpoint.with_name(f"{name}.pt")),
        "--report", str(checkpoint.with_name(f"{name}.json")),
    ]  # fmt: skip


def notes(checkpoint: Path, name: str) -> list[str]:
    notes: list[str] = json.loads(checkpoint.with_name(f"{name}.json").read_text())["notes"]
    return notes


def test_torchrun_writes_once_what_one_process_writes(checkpoint: Path, photos: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--standalone", "-m", "rewrite"]
    done = subprocess.run(
        [*launcher, *command(checkpoint, photos, "two")], capture_output=True, text=True,
        timeout=300, check=False, cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 2  # the model and its report, once
    assert main(command(checkpoint, photos, "one")) == 0
    assert notes(checkpoint, "two") == notes(checkpoint, "one")
    assert any("20.png" in note for note in notes(checkpoint, "two"))
    one, two = (rewrite.load(checkpoint.with_name(f"{n}.pt")) for n in ("one", "two"))
    for expected, value in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    for file in sorted(photos.iterdir())[16:32]:
        file.unlink()
    assert main(command(checkpoint, photos, "part")) == 0
    part = rewrite.load(checkpoint.with_name("part.pt"))
    assert not torch.allclose(part.get_parameter("1.bias"), one.get_parameter("1.bias"), rtol=1e-6)


def test_a_process_alone_joins_no_group() -> None:
    with process_group() as rank:
        assert rank == 0 and not torch.distributed.is_initialized()


def test_each_batch_is_announced_before_it_is_worked_on() -> None:
    said: list[str] = []
    source = Announced([1, 2], said.append, "bn-to-gn")
    seen = [(batch, said[-1]) for batch in source]
    assert seen == [
        (1, "bn-to-gn: calibration batch 1 of 2"), (2, "bn-to-gn: calibration batch 2 of 2"),
    ]  # fmt: skip
    assert next(iter(Announced(iter([1]), said.append, "x"))) == 1
    assert said[-1] == "x: calibration batch 1 of 1"


def test_the_command_says_which_batch_it_is_at(
    checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "rewrite.progress.ProgressLine.__call__", lambda self, step: said.append(step)
    )
    assert main([*command(checkpoint, photos, "one"), "--quiet"]) == 0
    assert [step for step in said if "batch" in step] == [
        f"bn-to-gn: calibration batch {number} of 3" for number in (1, 2, 3)
    ]


def interrupted() -> Iterator[torch.Tensor]:
    """Batches, of which the reading of the third is interrupted."""
    for _ in range(2):
        yield torch.rand(8, 3, 12, 12)
    raise KeyboardInterrupt


def test_an_interrupted_command_says_what_it_had_and_writes_nothing(
    checkpoint: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = command(checkpoint, photos, "one")
    parts[parts.index(str(photos))] = "tests.test_distributed:interrupted"
    assert main([*parts, "--input", "2x3x12x12"]) == 130
    assert "interrupted after 16 samples; nothing was fitted" in capsys.readouterr().err
    assert not checkpoint.with_name("one.pt").exists()


def test_poor_agreement_is_said_with_the_layers_that_lose_most(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 50),
    ).eval()  # fmt: skip
    for norm in (model[1], model[6]):
        nn.init.normal_(norm.running_mean)
    torch.save(model, tmp_path / "wide.pt")
    options = ["--keep", "function", "--calibration", str(photos), "--size", "12", "--force"]
    for groups, anchor, poor in (("8", "0", True), ("1", "30", False)):
        arguments = ["convert", "--bn-to-gn", "--num-groups", groups, "--anchor", anchor, *options]
        assert main([*arguments, str(tmp_path / "wide.pt")]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("does not agree well with the original; most is lost at 1, 6;" in printed) == poor
        assert "held-out calibration samples: same top-1 on" in printed
