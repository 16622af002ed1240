"""Resolve a MODEL reference to an `nn.Module`, and save one, without running foreign code.

    MODEL ::= path of a pickled nn.Module              torch.save(model, path), rewrite.save
            | path of an exported program              model.pt2
            | path of a state dict, with a factory     .pt .pth .safetensors
            | path of a checkpoint folder              config.json and safetensors
            | torchvision:NAME | timm:NAME             fresh weights, nothing is downloaded
            | package.module:callable[(json kwargs)]   any function or class that returns a module

    load(save(model)) == model                         tensors, ties, modes, classes, names

A file that exists is always a path; a name is tried afterwards. What a file may ask for is the
business of `names`, what a model may look like that of `check_loaded`. Code of a factory runs,
because the user named it. A pickled module keeps the mode it was saved in; a model that is built
here (a name, a factory) is in eval mode.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.checkpoint.check_loaded import check_loaded
from rewrite.checkpoint.closest import closest_reference
from rewrite.checkpoint.culprit import culprit
from rewrite.checkpoint.exported.program import load_exported
from rewrite.checkpoint.factory import FACTORY_NAME, build_named
from rewrite.checkpoint.pickler import write_model
from rewrite.checkpoint.pickles.state import build_state
from rewrite.checkpoint.pickles.unpickle import PickleFile, opened_pickle
from rewrite.checkpoint.state_dict import fill, read_safetensors, read_state, write_state
from rewrite.checkpoint.vetting.files import check_file, is_exported
from rewrite.checkpoint.vetting.opcodes import DictOf, Name, walk
from rewrite.checkpoint.vetting.state import (
    describe_root,
    find_state,
    is_module,
    left_out,
    pairs_of,
)
from rewrite.checkpoint.vetting.vet import needs_factory
from rewrite.errors import CheckpointError
from rewrite.files import atomic_path, is_folder, is_there
from rewrite.runtime.copying import copy_model, own_memory_


def silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class _Request:
    """How a file is to be opened."""

    path: Path
    factory: str | None
    trust: Sequence[str]
    device: str | torch.device
    key: str | None
    prefix: str | None
    seed: int | None
    note: Callable[[str], None]


def load(
    reference: str | os.PathLike[str],
    *,
    factory: str | None = None,
    trust: Sequence[str] = (),
    map_location: str | torch.device = "cpu",
    key: str | None = None,
    strip_prefix: str | None = None,
    seed: int | None = None,
    note: Callable[[str], None] = silent,
) -> nn.Module:
    """Return the model that a MODEL reference names; see the grammar above.

    The arguments are those of `rewrite.load`, in `rewrite.checkpoint.opening`.

    Raises:
        CheckpointError: The reference names nothing, or nothing that may be opened.
    """
    path = Path(reference)
    if is_folder(path):
        from rewrite.hub.load import load_folder

        return load_folder(path, map_location)
    if is_there(path) or not isinstance(reference, str):
        request = _Request(path, factory, trust, map_location, key, strip_prefix, seed, note)
        model = _load_file(request)
        try:
            if factory is None or _is_program(path):
                check_loaded(model, trust)  # what a factory made is the user's own code
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        own_memory_(model)
        return model
    match = FACTORY_NAME.fullmatch(reference)
    if match is None or path.suffix in (".pt", ".pth", ".pt2", ".safetensors", ".ckpt"):
        raise CheckpointError(
            f"{reference}: no such file, and no name like torchvision:resnet18"
            f"{closest_reference(reference)}"
        )
    if factory is not None:
        raise CheckpointError(f"{reference}: a name needs no factory ({factory})")
    return build_named(reference, seed).to(map_location)


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    strip_prefix: str | None = None,
    note: Callable[[str], None] = silent,
) -> nn.Module:
    """Return a copy of `model` with the tensors of a state dict in the place of its own.

    Args:
        model: What the state dict belongs to; it is not changed.
        path: A file of tensors by name.
        key: Where in a training checkpoint the state dict is.
        strip_prefix: What to take off the keys; by itself any prefix that makes all keys fit.
        note: Takes a line about each thing that was left out or renamed.

    Raises:
        CheckpointError: the file holds no state dict, or one that does not fit.
    """
    place = Path(path)
    copied = copy_model(model)
    state = read_state(place, key, strip_prefix is None)
    fill(place, "the other model", copied, state, note=note, prefix=strip_prefix)
    return copied


def holds_state(reference: str | os.PathLike[str], key: str | None = None) -> bool:
    """Say whether a reference is a file of tensors by name (at `key`), and no whole model.

    Raises:
        CheckpointError: it is a file that cannot be read.
    """
    path = Path(reference)
    if not is_there(path) or is_folder(path):
        return False
    check_file(path)
    if path.suffix == ".safetensors":
        return True
    if zipfile.is_zipfile(path) and is_exported(path):
        return False
    with opened_pickle(path) as file:
        if is_module(file.program.root):
            return False
        found = find_state(file.program.root, key)
    return found is not None and not is_module(found[1])


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Write a model so that `load` opens it again; all of it or nothing.

    Args:
        model: The model; it is not changed.
        path: The file to write; its folder must exist. A `.safetensors` file holds the state dict
            alone, and is opened with a factory.
        overwrite: Whether a file at `path` may be replaced.

    Raises:
        CheckpointError: The place cannot be written, or the model holds something (a lambda, a
            local class) that no file can hold.
    """
    target = Path(path)
    with atomic_path(path, overwrite=overwrite) as temporary:
        if target.suffix == ".safetensors":
            write_state(model.state_dict(), temporary, target.suffix)
        else:
            _write(model, temporary)
    return target


def _write(model: nn.Module, path: Path) -> None:
    """Write a model that `load` opens; raise CheckpointError that names what it cannot hold."""

    def fails(part: nn.Module) -> bool:
        try:
            write_model(part, path)
            _check_written(path)
        except CheckpointError:
            return True
        return False

    try:
        write_model(model, path)
        _check_written(path)
    except CheckpointError as error:
        place = culprit(model, fails)
        if place is None or str(error).startswith(f"{place}: "):
            raise
        reason = str(error).removeprefix("the model ")
        raise CheckpointError(f"{place}: {reason}") from error


def save_state(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Write the state dict of a model, as safetensors or with `torch.save`, as the suffix says.

    Args:
        model: The model; it is not changed.
        path: The file to write; its folder must exist.
        overwrite: Whether a file at `path` may be replaced.

    Raises:
        CheckpointError: The place cannot be written, or a `.safetensors` file cannot hold it.
    """
    target = Path(path)
    state = model.state_dict()
    with atomic_path(path, overwrite=overwrite) as temporary:
        write_state(state, temporary, target.suffix)
    return target


def _check_written(path: Path) -> None:
    """Raise CheckpointError unless `load` opens a file, with trust in all that it names."""
    try:
        with opened_pickle(path) as file:
            nodes = list(walk(file.program.root))
            names = {node.full for node in nodes if isinstance(node, Name)}
            names |= {
                value for node in nodes if isinstance(node, DictOf)
                for key, value in node.pairs if key == "target" and isinstance(value, str)
            }  # fmt: skip
            trust = sorted(names | {name.partition(".")[0] for name in names})
            try:
                model = file.build(file.program.root, trust, "meta")
            except CheckpointError:
                # There are no sparse and no quantized tensors without numbers.
                model = file.build(file.program.root, trust, "cpu")
            check_loaded(model, trust)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"the model cannot be written so that it opens: {reason}") from error


def _load_file(request: _Request) -> nn.Module:
    """Open a file by what is in it, not by what it is called."""
    path = request.path
    check_file(path)
    if path.suffix == ".safetensors":
        return _filled(request, lambda: read_safetensors(path, request.device))
    if _is_program(path):
        return load_exported(path, request.device)
    with opened_pickle(path) as file:
        try:
            found = find_state(file.program.root, request.key)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if found is None:
            _refuse(file, request)
            raise CheckpointError(
                f"{path}: holds neither a model nor a state dict, but "
                f"{describe_root(file.program.root)}"
            )
        if request.factory is None:
            return _opened(file, request, *found)
        return _tensors_only(file, request, *found)


def _is_program(path: Path) -> bool:
    return path.suffix != ".safetensors" and zipfile.is_zipfile(path) and is_exported(path)


def _opened(file: PickleFile, request: _Request, place: str, node: Any) -> nn.Module:
    """Return the module of a file; of a state dict, say that it needs a factory."""
    if is_module(node):
        model: nn.Module = file.build(node, request.trust, request.device, whole=True)
        for name in left_out(file.program.root, place):
            request.note(f"left out {name}")
        return model
    _refuse(file, request)
    where = f" under {place!r}" if place else ""
    text = needs_factory(len(pairs_of(node) or ()), where)
    raise CheckpointError(f"{request.path}: {text}")


def _refuse(file: PickleFile, request: _Request) -> None:
    """Raise CheckpointError for what a file asks for and may not have."""
    try:
        file.build(file.program.root, request.trust, "meta", whole=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; with --factory only its tensors are opened") from error


def _tensors_only(file: PickleFile, request: _Request, place: str, node: Any) -> nn.Module:
    """Build the factory's model and give it the tensors of the file; leave everything else."""
    if is_module(node):
        try:
            file.build(node, request.trust, "meta")
        except CheckpointError as error:
            request.note(f"took the tensors of a module that cannot be opened itself ({error})")
        else:
            raise CheckpointError(
                f"{request.path}: is a whole model, not a state dict; drop the factory"
            )
    for name in left_out(file.program.root, place):
        request.note(f"left out {name}")
    return _filled(request, lambda: build_state(file, node, request.device))


def _filled(request: _Request, read: Callable[[], Mapping[str, Tensor]]) -> nn.Module:
    """Build the factory's model and give it a state dict; the weights are held once."""
    if request.factory is None:
        raise CheckpointError(f"{request.path}: {needs_factory(len(read()))}")
    model = build_named(request.factory, request.seed).to(request.device)
    _release(model)
    fill(request.path, request.factory, model, read(), note=request.note, prefix=request.prefix)
    return model


def _release(model: nn.Module) -> None:
    """Give the memory of plain parameters back, before what takes their place is read."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"),
                        requires_grad=parameter.requires_grad,
                    )
                module._parameters[key] = moved[id(parameter)]
