"""`rewrite.load` judges a file before torch is imported, and opens what passes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import rewrite
from rewrite.checkpoint.opening import is_file
from rewrite.errors import CheckpointError


def test_what_is_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert is_file(tmp_path / "a")
    assert not is_file(tmp_path)
    assert not is_file("a" * 5000)
    assert not is_file("a\0b")


def test_load_opens_with_and_without_torch_there(tmp_path):
    path = rewrite.save(nn.Linear(2, 2), tmp_path / "m.pt")
    assert isinstance(rewrite.load(path), nn.Linear)
    code = "import sys, rewrite; print(type(rewrite.load(sys.argv[1])).__name__)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.strip() == "Linear", done.stderr
    torch.save({"w": torch.ones(1)}, tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="--factory"):
        rewrite.load(tmp_path / "s.pt")
