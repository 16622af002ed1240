"""Checkpoints that the tests of several commands read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rewrite
from models.randomize import randomize_norms_


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a pickled model: two BatchNorms, 64 and 7 channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 7, 3), nn.BatchNorm2d(7)
    )
    path = tmp_path / "model.pt"
    torch.save(randomize_norms_(model.eval(), 0), path)
    return path


@pytest.fixture
def model_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return `model.pt` in what is the current folder: one BatchNorm of 8 channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    rewrite.save(randomize_norms_(model).eval(), tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model.pt"


@pytest.fixture
def linears_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder: linear layers in float and int8, one sample, and sixteen."""
    torch.manual_seed(0)
    rewrite.save(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), tmp_path / "m.pt")
    whole = nn.Sequential(nn.Linear(3, 3))
    whole[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    rewrite.save(whole, tmp_path / "int.pt")
    np.savez(tmp_path / "one.npz", x=np.ones((1, 3), "f4"))
    varied = np.random.default_rng(0).normal(size=(16, 3)).astype("f4")
    np.savez(tmp_path / "varied.npz", x=varied)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Return how to write a checkpoint folder, as `tests.sharded.conftest.maker` does."""
    from tests.sharded.conftest import maker

    return maker(tmp_path)
