"""A MODEL reference to an `nn.Module` and back, without running foreign code.

    MODEL ::= path of a pickled nn.Module              torch.save(model, path), rewrite.save
            | path of an exported program              model.pt2
            | path of a state dict, with a factory     .pt .pth .safetensors
            | torchvision:NAME | timm:NAME             fresh weights, nothing is downloaded
            | package.module:callable[(json kwargs)]   any function or class that returns a module

    load(save(model)) == model                         tensors, ties, modes, classes, names

A file that exists is always a path; a name is tried afterwards. What a file may ask for is the
business of `rewrite.checkpoint.unpickle`. Code of a factory runs, because the user named it. A
pickled module keeps the mode it was saved in; a model that is built here (a name, a factory) is in
eval mode.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.checkpoint.exported_program import is_exported, load_exported
from rewrite.checkpoint.factory import FACTORY_NAME, build_named
from rewrite.checkpoint.mapped import MappedFile
from rewrite.checkpoint.pickler import write_model
from rewrite.checkpoint.state_dict import (
    check_file,
    describe_state,
    fill,
    read_safetensors,
    state_in,
)
from rewrite.checkpoint.unpickle import load_pickle
from rewrite.errors import CheckpointError
from rewrite.files import atomic_path
from rewrite.runtime.copying import own_memory_


def load(
    reference: str | os.PathLike[str],
    *,
    factory: str | None = None,
    trust: Sequence[str] = (),
    map_location: str | torch.device = "cpu",
) -> nn.Module:
    """Return the model that a MODEL reference names.

    Args:
        reference: A path or a name; see the grammar above.
        factory: `package.module:callable[(json kwargs)]` that builds the model of a state dict.
        trust: Packages (or full names of single classes and functions) that a file may name
            beside torch, torchvision, timm, transformers and rewrite. Naming a package allows
            its classes, and to import it.
        map_location: The device that the tensors of a file go to.

    Raises:
        CheckpointError: The reference names nothing, or nothing that may be opened.
    """
    path = Path(reference)
    if path.exists() or not isinstance(reference, str):
        model = _load_file(path, factory, trust, map_location)
        own_memory_(model, MappedFile(path).read)
        return model
    match = FACTORY_NAME.fullmatch(reference)
    if match is None or path.suffix in (".pt", ".pth", ".pt2", ".safetensors", ".ckpt"):
        raise CheckpointError(f"{reference}: no such file, and no name like torchvision:resnet18")
    if factory is not None:
        raise CheckpointError(f"{reference}: a name needs no factory ({factory})")
    return build_named(reference).to(map_location)


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Write a model so that `load` opens it again; all of it or nothing.

    Args:
        model: The model; it is not changed.
        path: The file to write; its folder must exist.
        overwrite: Whether a file at `path` may be replaced.

    Raises:
        CheckpointError: The place cannot be written, or the model holds something (a lambda, a
            local class) that no file can hold.
    """
    with atomic_path(path, overwrite=overwrite) as temporary:
        write_model(model, temporary)
    return Path(path)


def _load_file(
    path: Path, factory: str | None, trust: Sequence[str], map_location: str | torch.device
) -> nn.Module:
    """Open a file by what is in it, not by what it is called."""
    check_file(path)
    if path.suffix == ".safetensors":
        return _from_state(path, read_safetensors(path, map_location), factory, map_location)
    if zipfile.is_zipfile(path) and is_exported(path):
        return load_exported(path, map_location)
    content = load_pickle(path, trust=trust, map_location=map_location)
    if isinstance(content, nn.Module):
        if factory is not None:
            raise CheckpointError(f"{path}: is a whole model, not a state dict; drop the factory")
        return content
    return _from_state(path, content, factory, map_location)


def _from_state(
    path: Path, content: Any, factory: str | None, map_location: str | torch.device
) -> nn.Module:
    """Build the factory's model and give it the state dict that `content` is or nests."""
    state = state_in(content)
    if isinstance(state, nn.Module):
        return state
    if state is None:
        raise CheckpointError(
            f"{path}: holds neither a model nor a state dict, but {describe_state(content)}"
        )
    if factory is None:
        raise CheckpointError(
            f"{path}: is a state dict of {len(state)} tensors; say what builds the model with "
            "--factory package.module:callable"
        )
    model = build_named(factory).to(map_location)
    fill(path, factory, model, state)
    return model
