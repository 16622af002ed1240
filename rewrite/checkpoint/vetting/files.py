"""Say what kind of file something is, and refuse what is no checkpoint at all."""

from __future__ import annotations

import codecs
import zipfile
from pathlib import Path

from rewrite.errors import CheckpointError, system_reason
from rewrite.files import is_there, no_file


def check_file(path: Path) -> None:
    """Raise CheckpointError for what is no checkpoint, and say what it looks like instead."""
    if not is_there(path):
        raise CheckpointError(f"{path}: no such file")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give a file in it")
    if wrong := no_file(path):
        raise CheckpointError(f"{path}: {wrong}")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    if not head:
        raise CheckpointError(f"{path}: is empty")
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: is an ONNX graph; give the PyTorch model it was made from")
    if head.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path}: is GGUF, which holds quantized weights for inference; give the folder of "
            "safetensors that it was made from"
        )
    if head.startswith(b"PK"):
        _check_archive(path)
    elif path.suffix != ".safetensors" and _is_text(head):
        raise CheckpointError(f"{path}: is a text file, not a checkpoint")


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for a damaged archive and for TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # A damaged directory may hold a name that does not decode, or a version that no zip has.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error})") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: is TorchScript, whose modules cannot be edited; give the pickled module "
            "(torch.save(model)), or its state dict with a factory"
        )


def _is_text(head: bytes) -> bool:
    """Say whether the first bytes of a file read as text."""
    try:
        # A character may be cut off at the end.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def is_exported(path: Path) -> bool:
    """Say whether a zip archive is an exported program."""
    if path.suffix == ".pt2":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[-1] == "archive_format" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
