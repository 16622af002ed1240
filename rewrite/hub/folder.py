"""A checkpoint folder in the layout of Hugging Face: configuration, shards, index, other files.

Opening a folder reads `config.json`, the index and the headers of the shards, no tensors, and
checks that each tensor of the index stands in its shard exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rewrite.errors import CheckpointError, system_reason
from rewrite.files import named_twice, no_file
from rewrite.hub.merged import Merged
from rewrite.hub.safetensors_file import Entry, SafetensorsFile, open_safetensors

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_QUANTIZED = ("quantization_config", "compression_config")
"""Keys under which a configuration says how its weights are quantized."""
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


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether a path is a folder that contains `config.json`."""
    return path.is_dir() and (path / CONFIG).is_file()


def open_folder(path: str | Path) -> CheckpointFolder:
    """Open a folder and check that it is complete; no tensor is read.

    Raises:
        CheckpointError: it has no configuration, needs code of its own, is quantized, has no
            safetensors files, or its index and shards contradict each other.
    """
    folder = Path(path)
    _check_form(folder)
    config = _json(folder / CONFIG)
    _check_config(folder, config)
    if (folder / SINGLE).is_file():  # transformers opens it, whatever else is there
        single = open_safetensors(folder / SINGLE)
        return CheckpointFolder(
            folder, config, {SINGLE: single}, dict.fromkeys(single.entries, SINGLE), None
        )
    if not (folder / INDEX).is_file():
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        raise CheckpointError(
            f"{folder}: holds no {SINGLE} and no {INDEX}"
            + (
                f", only pickled weights ({pickled[0].name}); save it as safetensors"
                if pickled
                else ""
            )
        )
    index = _json(folder / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map of names to files")
    shards = {}
    for name in dict.fromkeys(places.values()):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: {name} is no file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} that the index names is missing")
        shards[name] = open_safetensors(folder / name)
    _check_index(folder, places, shards)
    return CheckpointFolder(folder, config, shards, places, index)


def _check_form(folder: Path) -> None:
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        raise CheckpointError(
            f"{folder}: GGUF holds quantized weights for inference; give the folder of safetensors "
            "that it was made from"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder")
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder}: holds an adapter ({_ADAPTER}), which transformers adds to a model; merge "
            "the two, and give the folder of the merged model"
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: is a folder without a {CONFIG}; give a checkpoint")


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder}: its configuration names code of its own (auto_map), which is never run; "
            "its class has to be one of transformers"
        )
    if (named := config.get("transformers_weights")) not in (None, SINGLE, INDEX):
        raise CheckpointError(
            f"{folder}: its configuration keeps the weights in {named} (transformers_weights); "
            f"give a folder that holds them in {SINGLE} or in shards"
        )
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in _QUANTIZED:
            if part.get(key) is not None:
                method = part[key].get("quant_method") if isinstance(part[key], dict) else None
                raise CheckpointError(
                    f"{folder}: its weights are quantized ({method or key}); give the checkpoint "
                    "that it was made from"
                )


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


def _json(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (twice := named_twice(pairs)) is not None:
            raise CheckpointError(f"{path}: names {twice} twice")
        return dict(pairs)

    if wrong := no_file(path):
        raise CheckpointError(f"{path}: {wrong}")
    try:
        held = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return held
