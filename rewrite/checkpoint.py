"""A MODEL reference to an `nn.Module` and back, without running foreign code.

    MODEL ::= path of a pickled nn.Module              torch.save(model, path), rewrite.save
            | path of an exported program              model.pt2
            | path of a state dict, with a factory     .pt .pth .safetensors
            | torchvision:NAME | timm:NAME             fresh weights, nothing is downloaded
            | package.module:callable[(json kwargs)]   any function or class that returns a module

    load(save(model)) == model                         tensors, ties, modes, classes, names

A file that exists is always a path; a name is tried afterwards. What a file may ask for is the
business of `rewrite.safeload`. Code of a factory runs, because the user named it. A pickled module
keeps the mode it was saved in; a model that is built here (a name, a factory) is in eval mode.
"""

from __future__ import annotations

import codecs
import importlib
import inspect
import json
import os
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import CheckpointError, system_reason
from rewrite.exported import is_exported, load_exported
from rewrite.files import atomic_path
from rewrite.mapped import MappedFile
from rewrite.pickler import write_model
from rewrite.safeload import load_pickle
from rewrite.tree import own_memory_
from rewrite.weight_norm_keys import fit_weight_norm_keys

_NAME = re.compile(
    r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)(?P<kwargs>\(.*\))?", re.S
)
_NESTED = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params"),
    *("model_ema", "ema", "state_dict_ema", "ema_state_dict", "params_ema"),
)
"""Where training checkpoints keep their state dict; the first that is there is taken."""

_WRAPPERS = ("module.", "_orig_mod.")


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
    match = _NAME.fullmatch(reference)
    if match is None or path.suffix in (".pt", ".pth", ".pt2", ".safetensors", ".ckpt"):
        raise CheckpointError(f"{reference}: no such file, and no name like torchvision:resnet18")
    if factory is not None:
        raise CheckpointError(f"{reference}: a name needs no factory ({factory})")
    return _build(reference).to(map_location)


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


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file by key: a state dict, or that of a whole model, on the CPU.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no tensors by name.
    """
    place = Path(path)
    _check_file(place)
    if place.suffix == ".safetensors":
        return _read_safetensors(place, "cpu")
    content = load_pickle(place, map_location="cpu")
    state = _state_in(content)
    if isinstance(state, nn.Module):
        return dict(state.state_dict())
    if state is None:
        raise CheckpointError(f"{path}: holds no state dict, but {_describe(content)}")
    return dict(state)


def _load_file(
    path: Path, factory: str | None, trust: Sequence[str], map_location: str | torch.device
) -> nn.Module:
    """Open a file by what is in it, not by what it is called."""
    _check_file(path)
    if path.suffix == ".safetensors":
        return _from_state(path, _read_safetensors(path, map_location), factory, map_location)
    if zipfile.is_zipfile(path) and is_exported(path):
        return load_exported(path, map_location)
    content = load_pickle(path, trust=trust, map_location=map_location)
    if isinstance(content, nn.Module):
        if factory is not None:
            raise CheckpointError(f"{path}: is a whole model, not a state dict; drop the factory")
        return content
    return _from_state(path, content, factory, map_location)


def _check_file(path: Path) -> None:
    """Raise CheckpointError for what is no checkpoint, and say what it looks like instead."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give a file in it")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    if not head:
        raise CheckpointError(f"{path}: is empty")
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: is an ONNX graph; give the PyTorch model it was made from")
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


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; the format holds nothing else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(map_location))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no readable safetensors file ({error})") from error


def _from_state(
    path: Path, content: Any, factory: str | None, map_location: str | torch.device
) -> nn.Module:
    """Build the factory's model and give it the state dict that `content` is or nests."""
    state = _state_in(content)
    if isinstance(state, nn.Module):
        return state
    if state is None:
        raise CheckpointError(
            f"{path}: holds neither a model nor a state dict, but {_describe(content)}"
        )
    if factory is None:
        raise CheckpointError(
            f"{path}: is a state dict of {len(state)} tensors; say what builds the model with "
            "--factory package.module:callable"
        )
    model = _build(factory).to(map_location)
    _fill(path, factory, model, state)
    return model


def _state_in(content: Any) -> Mapping[str, Tensor] | nn.Module | None:
    """Return the state dict (or module) that a checkpoint is or nests, without wrapper prefixes."""
    if isinstance(content, nn.Module):
        return content
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return _unwrapped(content)
    for key in _NESTED:
        found = _state_in(content.get(key))
        if found is not None:
            return found
    return None


def _unwrapped(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take off the prefixes that DataParallel and torch.compile put before every key."""
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            bare = OrderedDict((key.removeprefix(prefix), value) for key, value in state.items())
            versions = getattr(state, "_metadata", {})
            vars(bare)["_metadata"] = {
                "" if key == prefix[:-1] else key.removeprefix(prefix): version
                for key, version in versions.items()
                if key.startswith(prefix[:-1])
            }
            return _unwrapped(bare)
    return state


def _fill(path: Path, factory: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model` the tensors of `state` as they are; raise CheckpointError if keys do not match.

    The tensors are assigned, not copied: they keep the dtype of the file, and a mapped file is
    not read. Assigning separates tied parameters, which are tied again afterwards.
    """
    own = model.state_dict()
    metadata = getattr(state, "_metadata", {})
    state = fit_weight_norm_keys(state, own.keys())
    shaped = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and isinstance(own[key], Tensor) and own[key].shape != state[key].shape
    }
    ties = _ties(model)
    fitting = OrderedDict((key, value) for key, value in state.items() if key not in shaped)
    vars(fitting)["_metadata"] = metadata
    try:
        # Hooks of the model may rename keys of older versions, so it judges what is missing.
        keys = model.load_state_dict(fitting, strict=False, assign=True)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit {factory}: {said}") from error
    given = {key for names in ties for key in names if any(name in fitting for name in names)}
    missing = [key for key in keys.missing_keys if key not in shaped and key not in given]
    groups = (
        ("missing", missing),
        ("unexpected", keys.unexpected_keys),
        ("of another shape", list(shaped.values())),
    )
    parts = [f"{len(found)} {what} ({_first(found)})" for what, found in groups if found]
    if parts:
        raise CheckpointError(f"{path}: does not fit {factory}: {'; '.join(parts)}")
    for names in ties:
        source = next((name for name in names if name in fitting), names[0])
        parameter = model.get_parameter(source)
        for name in names:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = parameter


def _ties(model: nn.Module) -> list[list[str]]:
    """Return the keys of each parameter that has more than one."""
    keys: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    return [found for found in keys.values() if len(found) > 1]


def _first(keys: Sequence[str], limit: int = 3) -> str:
    """Return the first few keys in one line."""
    return ", ".join(keys[:limit]) + (", …" if len(keys) > limit else "")


def _describe(content: Any) -> str:
    """Say in a few words what an object is."""
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        return f"a {type(content).__name__} with the keys {_first(keys, 6) or '(none)'}"
    return f"a {type(content).__name__}"


def _build(reference: str) -> nn.Module:
    """Return the eval-mode model that a name or a factory stands for."""
    match = _NAME.fullmatch(reference)
    if match is None:
        raise CheckpointError(f"{reference}: is no factory; write package.module:callable")
    kwargs = _kwargs(reference, match["kwargs"])
    try:
        model = _call(match["module"], match["name"], kwargs)
    except CheckpointError as error:
        raise CheckpointError(f"{reference}: {error}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{reference}: raised {type(error).__name__}: {said}") from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{reference}: returned {_describe(model)}, not an nn.Module")
    return model.eval()


def _kwargs(reference: str, text: str | None) -> dict[str, Any]:
    """Parse the `({...})` of a factory."""
    inner = (text or "()")[1:-1].strip()
    try:
        kwargs = json.loads(inner or "{}")
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{reference}: the arguments are no JSON ({error})") from error
    if not isinstance(kwargs, dict):
        raise CheckpointError(
            f'{reference}: the arguments must be an object, as in ({{"width": 8}})'
        )
    return kwargs


def _call(module: str, name: str, kwargs: dict[str, Any]) -> Any:
    """Call the builder that a name stands for."""
    if module == "torchvision":
        return _torchvision(name, kwargs)
    if module == "timm":
        import timm

        return timm.create_model(name, **{"pretrained": False, **kwargs})
    # A factory in the folder where the user stands is found, as `python -m` finds it.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(f"cannot import {module} ({error})") from error
    finally:
        if added:
            sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(value, part):
            raise CheckpointError(f"{module} has no {name}")
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise CheckpointError(f"is a {type(value).__name__}, not a callable")
    return value(**kwargs)


def _torchvision(name: str, kwargs: dict[str, Any]) -> Any:
    """Build a torchvision model without downloading weights, those of its backbone neither."""
    from torchvision import models

    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    fresh = {key: None for key in ("weights", "weights_backbone") if key in known}
    return builder(**{**fresh, **kwargs})
