"""What a checkpoint folder says of itself: its configuration, its index, which files it lacks.

    folder = config.json + (model.safetensors | model.safetensors.index.json + its shards)

Nothing here imports torch: what is refused by a folder's form costs milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewrite.errors import CheckpointError, system_reason
from rewrite.files import named_twice, no_file

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_QUANTIZED = ("quantization_config", "compression_config")
"""Keys under which a configuration says how its weights are quantized."""


@dataclass(frozen=True)
class FolderForm:
    """What the files beside the tensors say.

    Attributes:
        config: the contents of `config.json`.
        index: the contents of the index; None for a folder with a single file.
        shards: the names of the safetensors files.
    """

    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    shards: tuple[str, ...]

    @property
    def places(self) -> Mapping[str, str]:
        """The shard of each tensor, as the index has it."""
        return {} if self.index is None else dict(self.index["weight_map"])


def read_form(folder: Path) -> FolderForm:
    """Read the configuration and the index of a folder.

    Raises:
        CheckpointError: it has no configuration, needs code of its own, is quantized, has no
            safetensors files, or a shard that its index names is missing.
    """
    _check_form(folder)
    config = _json(folder / CONFIG)
    _check_config(folder, config)
    if (folder / SINGLE).is_file():  # transformers opens it, whatever else is there
        return FolderForm(config, None, (SINGLE,))
    if not (folder / INDEX).is_file():
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        instead = f", only pickled weights ({pickled[0].name}); save it as safetensors"
        raise CheckpointError(
            f"{folder}: holds no {SINGLE} and no {INDEX}{instead if pickled else ''}"
        )
    index = _json(folder / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map of names to files")
    shards = tuple(dict.fromkeys(places.values()))
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: {name} is no file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} that the index names is missing")
    return FolderForm(config, index, shards)


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
