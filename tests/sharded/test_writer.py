"""The shards of a new folder: what stands in them, and a disk that is full at any file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewrite.errors import CheckpointError
from rewrite.hub.folder import open_folder
from rewrite.sharded import staging
from rewrite.sharded.plan import Made
from rewrite.sharded.staging import staged_folder
from rewrite.sharded.writer import NEW_SHARD, FolderWriter

OLD = {
    "one.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)},
    "two.safetensors": {"c": torch.zeros(3, dtype=torch.int64)},
    "three.safetensors": {"d": torch.full((5,), 2.0), "e": torch.full((5,), 3.0)},
}
NEW = {"b": torch.full((4,), 7.0), "f": torch.full((2, 2), 5.0)}
FILES = [*OLD, NEW_SHARD, "config.json", "model.safetensors.index.json", "tokenizer/vocab.txt"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "tokenizer").mkdir(parents=True)
    places = {}
    for shard, held in OLD.items():
        save_file(held, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(held, shard)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer" / "vocab.txt").write_text("one two")
    index = {"metadata": {"total_size": 1, "made": "by hand"}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write(source: Path, target: Path, gone: tuple[str, ...] = ()) -> None:
    folder = open_folder(source)
    made = {name: Made("F32", tuple(tensor.shape)) for name, tensor in NEW.items()}
    with (
        staged_folder(target, []) as stage,
        FolderWriter(folder, stage, made, gone, {"k": 1}) as writer,
    ):
        for name, tensor in NEW.items():
            writer.put(name, tensor)
        writer.copy_rest(lambda step: None)
        writer.write_rest()


def test_what_is_written_copied_new_and_gone_stands_in_the_shards(source: Path) -> None:
    target = source.with_name("out")
    write(source, target, gone=("c", "d"))
    held: dict[str, Mapping[str, torch.Tensor]] = {
        file.name: load_file(file) for file in target.glob("*.safetensors")
    }
    # A shard of which nothing is left is none; one that lost a tensor keeps the other's bytes.
    assert {k: set(v) for k, v in held.items()} == {
        "one.safetensors": {"a", "b"}, "three.safetensors": {"e"}, NEW_SHARD: {"f"},
    }  # fmt: skip
    every = {name: tensor for part in held.values() for name, tensor in part.items()}
    wanted = {"a": OLD["one.safetensors"]["a"], "e": OLD["three.safetensors"]["e"], **NEW}
    assert all(torch.equal(every[name], tensor) for name, tensor in wanted.items())
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "one.safetensors", "b": "one.safetensors", "e": "three.safetensors", "f": NEW_SHARD,
    }  # fmt: skip
    size = sum(tensor.nbytes for tensor in every.values())
    assert index["metadata"] == {"total_size": size, "made": "by hand"}
    assert open_folder(target).config == {"k": 1}
    assert (target / "tokenizer" / "vocab.txt").read_text() == "one two"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("when", ["opened", "flushed"])
def test_a_disk_that_is_full_leaves_nothing(
    file: str, when: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    target, hit = source.with_name("out"), []

    def breaks(path: Path) -> None:
        if path.as_posix().endswith(f"whole/{file}"):
            hit.append(path)
            raise full

    real_allocate, real_text, real_copy = os.posix_fallocate, Path.write_text, shutil.copy2
    real_flush = staging._flush

    def allocate(handle: int, *rest: Any) -> None:
        breaks(Path(f"/proc/self/fd/{handle}").readlink())
        real_allocate(handle, *rest)

    def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
        breaks(path)
        return real_text(path, *args, **kwargs)

    def copy(old: Any, new: Any) -> Any:
        breaks(Path(new))
        return real_copy(old, new)

    def flush(path: Path) -> None:
        breaks(path)
        real_flush(path)

    if when == "flushed":
        monkeypatch.setattr(staging, "_flush", flush)
    else:
        monkeypatch.setattr(os, "posix_fallocate", allocate)
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(shutil, "copy2", copy)
    with pytest.raises(CheckpointError, match=f"{target}: (?i:no space left)"):
        write(source, target)
    assert hit and [path.name for path in source.parent.iterdir()] == ["source"]
    monkeypatch.undo()
    write(source, target)
    assert target.is_dir()


def test_a_disk_that_fills_up_while_a_tensor_is_written_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a way to take the room beforehand."""
    real = os.pwrite

    def write_some(handle: int, content: Any, at: int) -> int:
        if at > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, content, at)

    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, "pwrite", write_some)
    with pytest.raises(CheckpointError, match=r"(?i)no space left"):
        write(source, source.with_name("out"))
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_disk_that_refuses_a_shard_that_is_whole_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is flushed by another thread, while the next ones are written."""
    real, hit = os.fsync, []

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name == "three.safetensors":
            hit.append(threading.current_thread())
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"(?i)input/output error"):
        write(source, source.with_name("out"))
    assert hit and hit[0] is not threading.main_thread()
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_each_shard_is_flushed_once_it_is_whole_and_not_before(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bytes] = {}

    def fsync(handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}").readlink()
        seen.setdefault(place.name, place.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    write(source, source.with_name("out"))
    shards = {*OLD, NEW_SHARD}
    assert shards <= seen.keys()
    assert all(seen[n] == (source.with_name("out") / n).read_bytes() for n in shards)
