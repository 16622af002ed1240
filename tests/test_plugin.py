"""A pass of another package, really installed, is listed and used like our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the plugin with pip into a folder of its own, and put that on the path."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(Path(__file__).with_name("plugin"), folder / "source")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--target", str(folder / "site"), str(folder / "source")],
        check=True, capture_output=True,
    )  # fmt: skip
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from rewrite.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_is_listed(environment: dict[str, str]) -> None:
    done = command(environment, "passes")
    assert done.returncode == 0, done.stderr
    assert "relu-to-silu [from example-passes]" in " ".join(done.stdout.split())
    one = command(environment, "passes", "relu-to-silu")
    assert "--inplace (bool, default False)" in one.stdout


def test_is_a_flag_with_its_option(environment: dict[str, str], tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), tmp_path / "m.pt")
    done = command(environment, "convert", "--relu-to-silu", "--inplace", str(tmp_path / "m.pt"))
    assert done.returncode == 0, done.stderr
    assert "SiLU" in done.stdout and "relu-to-silu{inplace=true}" in done.stdout


def test_without_it_the_flag_is_unknown(tmp_path: Path) -> None:
    done = command(dict(os.environ), "convert", "--relu-to-silu", str(tmp_path / "m.pt"))
    assert done.returncode == 2 and "relu-to-silu" in done.stderr
