"""A recovery as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rewrite.training import penultimate_plane, plot_penultimate


def test_the_picture(tmp_path: Path) -> None:
    plane = penultimate_plane(nn.Linear(5, 3), torch.randn(9, 5), torch.arange(3).repeat(3))
    path = plot_penultimate({"teacher": plane, "student": plane}, tmp_path / "p.svg")
    assert "<svg" in path.read_text()
