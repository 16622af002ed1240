"""Judge the members of an exported program (`.pt2`) before any of it is built.

    member in a list of names;  models/NAME.json, *_config.json: JSON
    tensors = raw bytes         nothing is pickled, nothing is of a class of its own

The JSON is compared with PyTorch's whole schema later; here, what would be dangerous in it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from rewrite.checkpoint.archive import Archive
from rewrite.checkpoint.vetting.names import refuse_unless_allowed
from rewrite.checkpoint.vetting.opcodes import Name
from rewrite.checkpoint.vetting.programs import archived_program
from rewrite.checkpoint.vetting.sizes import check_size, identifier
from rewrite.errors import CheckpointError

_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version"
    r"|\.storage_alignment|models/\w+\.json"
    r"|data/(weights|constants)/(\w+|\w+_config\.json)|data/sample_inputs/\w+\.pt"
)
_TENSOR = re.compile(r"(weight|tensor)_\d+")
_MOST_VALUES = 20_000_000


def vet_exported(archive: Archive) -> str:
    """Return the name of the member that holds the program.

    Raises:
        CheckpointError: a member is none of an exported program, or says what no program needs.
    """
    for name in sorted(archive.names):
        if _MEMBERS.fullmatch(name) is None:
            raise CheckpointError(f"holds {name}, which is no part of an exported program")
        if name.startswith("data/sample_inputs/"):
            _check_sample(archive.read(name))
        elif name.endswith("_config.json"):
            _check_config(_json(archive.read(name)))
    models = [name for name in archive.names if name.startswith("models/")]
    if len(models) != 1:
        raise CheckpointError(f"holds {len(models)} programs instead of one")
    if "byteorder" in archive.names and archive.read("byteorder").strip() != b"little":
        raise CheckpointError("was written on a machine of another byte order")
    for key, value in _entries(_json(archive.read(models[0]))):
        if key == "expr_str" and isinstance(value, str):
            check_size(value)
        elif key == "forward_arg_names" and isinstance(value, list):
            for name in value:
                identifier(name)
    return models[0]


def _json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("holds JSON that cannot be read") from error
    if not isinstance(content, dict):
        raise CheckpointError("holds JSON that is no object")
    return content


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key of each object in a JSON value with its value."""
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise CheckpointError("holds JSON of too many parts")
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _check_config(content: dict[str, Any]) -> None:
    """Raise CheckpointError unless every tensor of a list of them is raw bytes."""
    config = content.get("config")
    for key, entry in config.items() if isinstance(config, dict) else ():
        if not isinstance(entry, dict):
            raise CheckpointError(f"holds {key}, which says nothing of a tensor")
        if entry.get("use_pickle"):
            raise CheckpointError(
                f"holds {key} as a pickled tensor; export the program on plain tensors"
            )
        path = entry.get("path_name")
        if entry.get("tensor_meta") is None or not (
            isinstance(path, str) and _TENSOR.fullmatch(path)
        ):
            raise CheckpointError(f"holds {key}, an object of a class of its own")


def _check_sample(data: bytes) -> None:
    """Raise CheckpointError unless the sample inputs are plain tensors; none is made of them."""
    if not data:
        return
    try:
        program = archived_program(Archive(io.BytesIO(data)))
        for event in program.events:
            if isinstance(event.node, Name):
                refuse_unless_allowed(event.node.full, ())
    except CheckpointError as error:
        raise CheckpointError(f"holds sample inputs that are no plain tensors: {error}") from error
