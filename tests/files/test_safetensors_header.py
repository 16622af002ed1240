"""The header of a safetensors file is held to the bytes that follow it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewrite.checkpoint.load import load
from rewrite.errors import CheckpointError
from rewrite.files.safetensors_header import read_header

W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(path: Path, header: str | dict, data: int = 8) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def test_what_the_library_writes_passes(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn,
             torch.complex64, torch.uint16)  # fmt: skip
    tensors = {str(kind): torch.zeros(3, 2).to(kind) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert len(read_header(tmp_path / "x.safetensors").entries) == len(tensors)
    assert len(read_header(_file(tmp_path / "y.safetensors", {"w": W})).entries) == 1
    assert len(read_header(_file(tmp_path / "y.safetensors", {}, 0)).entries) == 0


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"w": W | {"shape": [1 << 40]}}, 8, "8 bytes for 'w' of F32 (1099511627776,)"),
        ({"w": W | {"shape": [-2]}}, 8, "nothing readable of 'w'"),
        ({"w": W | {"shape": [2.0]}}, 8, "nothing readable"),
        ({"w": W | {"shape": "2"}}, 8, "nothing readable"),
        ({"w": W | {"data_offsets": [8, 0]}}, 8, "-8 bytes"),
        ({"w": W | {"data_offsets": [4, 12]}}, 12, "does not begin"),
        ({"w": W | {"data_offsets": [0]}}, 8, "nothing readable"),
        ({"w": W, "v": W}, 8, "does not begin"),
        ({"w": W}, 16, "has 16 bytes of tensors where its header says 8"),
        ({"w": W}, 4, "has 4 bytes"),
        ({"w": 3}, 8, "nothing readable"),
        (f'{{"w": {json.dumps(W)}, "w": {json.dumps(W)}}}', 8, "names 'w' twice"),
        ("[" * 100_000, 8, "its header is damaged"),
        ("[]", 8, "its header is damaged"),
        ("{", 8, "no safetensors file"),
        ('{"w"', 8, "its header is damaged"),
        ("\x00", 8, "no safetensors file"),
        ({"w": W, "__metadata__": 3}, 8, "__metadata__ holds more than texts"),
        ({"w": W, "__metadata__": {"format": 1}}, 8, "__metadata__ holds more than texts"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: str | dict, data: int, said: str) -> None:
    path = _file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert said in str(caught.value)
    factory = 'torch.nn:Linear({"in_features": 1, "out_features": 2})'
    with pytest.raises(CheckpointError, match=str(path)):
        load(path, factory=factory)


@pytest.mark.parametrize("length", [1 << 30, 1 << 63, 200])
def test_a_header_that_is_longer_than_the_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cut off"):
        read_header(tmp_path / "x.safetensors")


def test_many_names_of_which_the_last_is_there_twice_take_no_time(tmp_path: Path) -> None:
    names = [f"n{index}" for index in range(100_000)] + ["n99999"]
    text = "{" + ",".join(f'"{name}": 1' for name in names) + "}"
    with pytest.raises(CheckpointError, match="n99999"):
        read_header(_file(tmp_path / "x.safetensors", text))
