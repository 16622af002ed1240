"""Without transformers, whatever opens a folder of it says in one line what to install."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rewrite
from rewrite.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkpoint folder, in an interpreter that has no transformers."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    return tmp_path


@pytest.mark.parametrize(
    "opened",
    [rewrite.load, lambda folder: rewrite.convert_checkpoint(folder, folder / "out", ["fold"])],
    ids=["load", "convert_checkpoint"],
)
def test_a_folder_names_the_extra(folder: Path, opened: Any) -> None:
    with pytest.raises(rewrite.RewriteError, match="pip install transformers accelerate") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_the_command_names_the_extra(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--fold", str(folder), "-o", str(folder / "out")]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "pip install transformers" in said[0]
