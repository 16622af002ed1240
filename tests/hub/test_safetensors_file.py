"""Heads and bytes of safetensors files, against the library that owns the format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewrite.errors import CheckpointError
from rewrite.files.safetensors_header import header_of
from rewrite.hub.safetensors_file import bytes_of, open_safetensors, type_name

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).to(torch.bfloat16),
    "c": torch.tensor([[True], [False]]),
    "d": torch.arange(7),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_every_tensor_is_read(path: Path) -> None:
    opened = open_safetensors(path)
    assert set(opened.entries) == set(TENSORS) and opened.header.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        read = opened.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    head, entries = header_of(
        {n: (type_name(t.dtype), tuple(t.shape), t.nbytes) for n, t in TENSORS.items()},
        {"format": "pt"},
    )
    with (tmp_path / "y.safetensors").open("wb") as stream:
        stream.write(head)
        for name, tensor in TENSORS.items():
            assert stream.tell() == len(head) + entries[name].begin
            stream.write(bytes_of(tensor))
    found = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_system_that_reads_less_than_asked_is_asked_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reads at most 2 GB at once: an embedding of a large vocabulary has more."""

    class Slow(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            return super().readinto(memoryview(buffer)[:5])

    opened = open_safetensors(path)
    monkeypatch.setattr(Path, "open", lambda self, *given, **named: Slow(self))
    assert torch.equal(opened.read("a"), TENSORS["a"])
    assert torch.equal(opened.read("d"), TENSORS["d"])


def test_a_file_that_became_shorter_is_refused(path: Path) -> None:
    opened = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: ends within "):
        for name in TENSORS:
            opened.read(name)


@pytest.mark.parametrize("cut", [0, 4, 9, 60, -1])
def test_a_file_that_is_cut_off_is_refused(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        open_safetensors(path)


def test_a_length_beyond_the_file_is_refused_before_memory_is_taken(path: Path) -> None:
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="cut off"):
        open_safetensors(path)


def test_a_shape_that_its_bytes_do_not_hold_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[3,4]", b"[3,5]"))
    with pytest.raises(CheckpointError, match="48 bytes for 'a' of F32"):
        open_safetensors(path)
