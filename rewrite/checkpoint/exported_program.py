"""Open a `.pt2` exported program without running foreign code.

    vet(archive) and then torch.export.load(archive)

`torch.export.load` is no safe loader: it unpickles weights and sample inputs, imports the modules
that a signature names, parses symbolic sizes with `sympify` (which evaluates its text), runs guards
as source and loads compiled libraries. So the archive is read first, as zip and JSON, and only one
that needs none of this is opened: tensors as raw bytes, operators that
`rewrite.checkpoint.allowed_functions` lists, signatures of tuples, lists and dicts, sizes that are
sums and products of symbols. Guards are dropped: they check inputs, and are no part of the model.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.fx

from rewrite.checkpoint.allowed_functions import find_function
from rewrite.errors import CheckpointError

_MEMBERS = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version"
    r"|\.storage_alignment|models/\w+\.json"
    r"|data/(weights|constants)/(\w+|\w+_config\.json)|data/sample_inputs/\w+\.pt)"
)


_NAME = re.compile(r"[\w.\-]*")


_WORDS = re.compile(r"[A-Za-z_]\w*")


_SYMBOL = re.compile(r"[a-z]+\d+")


_SIZES = re.compile(r"[\w\s()+*/,<>=!&|~%'-]*")


_SIZE_WORDS = frozenset(
    {
        *("Symbol", "Integer", "Max", "Min", "Mod", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And"),
        *("Or", "Not", "FloorDiv", "ModularIndexing", "PythonMod", "CleanDiv", "CeilDiv", "Where"),
        *("CeilToInt", "FloorToInt", "IntTrueDiv", "ToFloat", "TruncToInt", "RoundToInt"),
        *("positive", "nonnegative", "integer", "True", "False", "oo", "int_oo"),
    }
)


_LEFT_BY_EXPORT = ("train", "eval", "range_constraints", "validate_inputs")


def is_exported(path: Path) -> bool:
    """Say whether a zip archive is an exported program."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return path.suffix == ".pt2" or any(name.endswith("/archive_format") for name in names)


def load_exported(path: Path, map_location: str | torch.device) -> torch.fx.GraphModule:
    """Return the module of an exported program, or raise CheckpointError."""
    with zipfile.ZipFile(path) as archive:
        try:
            _vet(archive)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: is no readable exported program ({error})") from error
    try:
        with path.open("rb") as stream:
            program = torch.export.load(stream)
        program._guards_code = []
        module = program.module(check_guards=False)
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be opened as an exported program: {said}") from error
    if not isinstance(module, torch.fx.GraphModule):
        raise CheckpointError(f"{path}: does not hold a graph")
    _free(module)
    return module.to(map_location)


def _free(module: torch.fx.GraphModule) -> None:
    """Take off the checks of inputs, and let the module change its mode like any other."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(module, hooks, OrderedDict())
    for name in _LEFT_BY_EXPORT:
        vars(module).pop(name, None)


def _vet(archive: zipfile.ZipFile) -> None:
    """Raise CheckpointError unless opening the archive runs nothing."""
    for name in archive.namelist():
        if _MEMBERS.fullmatch(name) is None:
            raise CheckpointError(f"holds {name}, which is no part of an exported program")
        if name.endswith(".json"):
            content = json.loads(archive.read(name))
            for key, value in _entries(content):
                _check_entry(key, value)
            if name.partition("/")[2].startswith("models/"):
                _check_signatures(content)
        elif "/data/sample_inputs/" in name:
            _check_sample(archive.read(name))


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key and value of nested JSON."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _check_entry(key: str, value: Any) -> None:
    """Raise CheckpointError for an entry that would run something."""
    if _NAME.fullmatch(key) is None:
        raise CheckpointError(f"holds the name {key!r}")
    if key == "use_pickle" and value:
        raise CheckpointError("holds a pickled tensor; export the program on plain tensors")
    if key in ("target", "as_operator") and isinstance(value, str):
        find_function(value, ())
    if key == "expr_str":
        _check_size(value)
    is_name = key == "name" or key.endswith("_name")
    if is_name and isinstance(value, str) and _NAME.fullmatch(value) is None:
        raise CheckpointError(f"holds the name {value!r}")
    if key == "as_custom_obj":
        raise CheckpointError("holds an object of a class of its own")


def _check_size(text: Any) -> None:
    """Raise CheckpointError unless `text` is arithmetic on symbols."""
    words = set(_WORDS.findall(str(text))) - _SIZE_WORDS
    if _SIZES.fullmatch(str(text)) is None or not all(_SYMBOL.fullmatch(word) for word in words):
        raise CheckpointError(f"holds the size {text!r}")


def _check_signatures(content: Any) -> None:
    """Raise CheckpointError unless inputs and outputs are tuples, lists and dicts."""
    for key, value in _entries(content):
        if key in ("in_spec", "out_spec") and value:
            _check_spec(json.loads(value)[1])


def _check_spec(spec: Any) -> None:
    """Check one level of a signature, and what is below it."""
    if spec["type"] not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
        raise CheckpointError(f"takes or returns a {spec['type']}")
    context = json.loads(spec["context"]) if isinstance(spec["context"], str) else None
    names = context if isinstance(context, list) else [context]
    if not all(name is None or (isinstance(name, str) and name.isidentifier()) for name in names):
        raise CheckpointError(f"takes or returns a container with the keys {spec['context']!r}")
    for child in spec["children_spec"]:
        _check_spec(child)


def _check_sample(data: bytes) -> None:
    """Raise CheckpointError unless the sample inputs are plain tensors."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="meta")
    except Exception as error:
        raise CheckpointError("holds sample inputs that are no plain tensors") from error
