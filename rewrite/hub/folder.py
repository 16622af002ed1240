"""A checkpoint folder in the layout of Hugging Face: configuration, shards, index, other files.

Opening a folder reads `config.json`, the index and the headers of the shards, no tensors, and
checks that each tensor of the index stands in its shard exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rewrite.errors import CheckpointError
from rewrite.files.safetensors_header import Entry
from rewrite.hub.form import CONFIG, INDEX, SINGLE, read_form
from rewrite.hub.merged import Merged
from rewrite.hub.safetensors_file import SafetensorsFile, open_safetensors

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".gguf")
"""Endings of files that hold weights."""


@dataclass(frozen=True)
class CheckpointFolder:
    """An open folder: its configuration, and where each tensor is stored.

    Attributes:
        path: the folder.
        config: the contents of `config.json`.
        shards: the safetensors files, by file name.
        places: the file name of the shard that holds each tensor.
        index: the contents of the index; None for a folder with a single file.
        merged: tensors of the model that are assembled from several stored ones, by their names in
            the model.
        copies: stored duplicates of tied tensors: the name of the duplicate, and of the tensor
            that the class ties it to.
    """

    path: Path
    config: Mapping[str, Any]
    shards: Mapping[str, SafetensorsFile]
    places: Mapping[str, str]
    index: Mapping[str, Any] | None
    merged: Mapping[str, Merged] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def holds(self, name: str) -> bool:
        """Return whether a tensor of that name is stored, or can be assembled from stored ones."""
        return name in self.places or name in self.merged

    def entry(self, name: str) -> Entry:
        """Return dtype, shape and byte range of a tensor; KeyError if there is none."""
        if name in self.merged:
            return self.merged[name].entry(self.entry)
        return self.shards[self.places[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory, in the dtype it is stored in.

        Raises:
            CheckpointError: there is none of that name, or torch has no such dtype.
        """
        if name in self.merged:
            return self.merged[name].read(self.read)
        if name not in self.places:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        return self.shards[self.places[name]].read(name)

    def same(self, name: str, other: str) -> bool:
        """Return whether two tensors are stored as the same bytes; they are read block by block."""
        if name in self.merged or other in self.merged:
            return False
        shards = [self.shards[self.places[each]] for each in (name, other)]
        first, second = (s.entries[n] for s, n in zip(shards, (name, other), strict=True))
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        blocks = zip(shards[0].blocks(name), shards[1].blocks(other), strict=True)
        return all(a == b for a, b in blocks)

    def others(self) -> list[Path]:
        """Return all other files, sorted: tokenizer, generation configuration and so on."""
        own = {*self.shards, CONFIG, INDEX}
        found = sorted(path for path in self.path.rglob("*") if path.is_file())
        return [path for path in found if path.relative_to(self.path).as_posix() not in own]


def other_weights(folder: CheckpointFolder) -> list[str]:
    """Return other files with weights (.bin, .onnx, …), which a conversion leaves as they are."""
    return [
        path.relative_to(folder.path).as_posix()
        for path in folder.others()
        if path.suffix in _WEIGHTS and "training_args" not in path.name
    ]


def open_folder(path: str | Path) -> CheckpointFolder:
    """Open a folder and check that it is complete; no tensor is read.

    Raises:
        CheckpointError: it has no configuration, needs code of its own, is quantized, has no
            safetensors files, or its index and shards contradict each other.
    """
    folder = Path(path)
    form = read_form(folder)
    shards = {name: open_safetensors(folder / name) for name in form.shards}
    if form.index is None:
        places: Mapping[str, str] = dict.fromkeys(shards[SINGLE].entries, SINGLE)
    else:
        places = form.places
        _check_index(folder, places, shards)
    return CheckpointFolder(folder, form.config, shards, places, form.index)


def _check_index(
    folder: Path, places: Mapping[str, str], shards: Mapping[str, SafetensorsFile]
) -> None:
    for name, shard in places.items():
        if name not in shards[shard].entries:
            raise CheckpointError(f"{folder}: {shard} has no {name}, which the index places there")
    for shard, held in shards.items():
        for name in held.entries:
            if places.get(name) != shard:
                also = f", and places it in {places[name]}" if name in places else ""
                raise CheckpointError(
                    f"{folder}: {shard} holds {name}, which the index does not name there{also}"
                )
