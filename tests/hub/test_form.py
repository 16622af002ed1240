"""A folder is refused by its form before torch is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rewrite.cli.main import main
from rewrite.errors import CheckpointError
from rewrite.hub.form import read_form

INDEX = {"weight_map": {"w": "a.safetensors"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (place / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    save_file({"w": np.ones((2, 2), np.float32)}, place / "a.safetensors")
    return place


def test_a_whole_folder_says_where_its_tensors_are(folder: Path) -> None:
    form = read_form(folder)
    assert form.places == INDEX["weight_map"] and form.shards == ("a.safetensors",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"auto_map": {"AutoModel": "a.B"}}, "auto_map"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
        ("config.json", [], "no JSON object"),
        ("model.safetensors.index.json", {"weight_map": {"w": "../a"}}, "is no file name"),
        ("model.safetensors.index.json", {"weight_map": {"w": "b.safetensors"}}, "is missing"),
        ("model.safetensors.index.json", {"weight_map": 3}, "no weight_map"),
        ("a.safetensors", 3, r"a\.safetensors: is no (readable )?safetensors file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_what_its_form_refuses_is_one_line(
    folder: Path, name: str, content: Any, said: str, command: str, capsys: Any
) -> None:
    (folder / name).write_text(json.dumps(content))
    if name != "a.safetensors":
        with pytest.raises(CheckpointError, match=said):
            read_form(folder)
    arguments = [command, str(folder)]
    arguments += ["--fold", "-o", str(folder.with_name("out"))] if command == "convert" else []
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    assert not folder.with_name("out").exists()


def test_torch_is_not_imported_for_it(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"auto_map": {}}))
    code = (
        "import sys; from rewrite.cli.main import main; "
        f"code = main(['inspect', {str(folder)!r}]); "
        "sys.exit(0 if code == 2 and 'torch' not in sys.modules else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder.parent)
