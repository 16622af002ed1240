"""Read a state dict from a file and load it into a model: keys, shapes, ties, weight norm."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.checkpoint.pickles.state import build_state
from rewrite.checkpoint.pickles.unpickle import opened_pickle
from rewrite.checkpoint.prefixes import fit_prefix, needed, without_wrappers
from rewrite.checkpoint.vetting.files import check_file
from rewrite.checkpoint.vetting.state import describe_root, find_state
from rewrite.checkpoint.vetting.vet import vet_safetensors
from rewrite.errors import CheckpointError
from rewrite.files.safetensors_header import header_of
from rewrite.text.some import some
from rewrite.weights.weight_norm_keys import fit_weight_norm_keys


def read_state(
    path: str | os.PathLike[str], key: str | None = None, bare: bool = True
) -> dict[str, Tensor]:
    """Return the tensors of a file by key: a state dict, or that of a whole model, on the CPU.

    Args:
        path: The file.
        key: Where in a training checkpoint the state dict is.
        bare: Take off what DataParallel, FSDP and torch.compile put before the keys.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no tensors by name.
    """
    place = Path(path)
    check_file(place)
    if place.suffix == ".safetensors":
        return read_safetensors(place, "cpu")
    with opened_pickle(place) as file:
        found = find_state(file.program.root, key)
        if found is None:
            raise CheckpointError(
                f"{path}: holds no state dict, but {describe_root(file.program.root)}"
            )
        state = build_state(file, found[1], "cpu")
        return without_wrappers(state) if bare else state


def read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; the format holds nothing else.

    Raises:
        CheckpointError: it is no such file, or a damaged one.
    """
    vet_safetensors(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(map_location))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no readable safetensors file ({error})") from error


def fill(
    path: Path,
    factory: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    note: Callable[[str], None] = lambda _: None,
    prefix: str | None = None,
) -> None:
    """Give `model` the tensors of `state` as they are; raise CheckpointError if keys do not match.

    The tensors are assigned, not copied: they keep the dtype of the file. Assigning separates tied
    parameters, which are tied again afterwards. A prefix before all keys of the model is taken
    off, and `note` is told.
    """
    own = model.state_dict()
    try:
        state = _without_prefix(model, own.keys(), state, note, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
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
        message = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit {factory}: {message}") from error
    given = {key for names in ties for key in names if any(name in fitting for name in names)}
    missing = [key for key in keys.missing_keys if key not in shaped and key not in given]
    groups = (
        ("missing", missing),
        ("unexpected", keys.unexpected_keys),
        ("of another shape", list(shaped.values())),
    )
    parts = [f"{len(found)} {what} ({some(found)})" for what, found in groups if found]
    if parts:
        raise CheckpointError(f"{path}: does not fit {factory}: {'; '.join(parts)}")
    for names in ties:
        source = next((name for name in names if name in fitting), names[0])
        parameter = model.get_parameter(source)
        for name in names:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = parameter


def _without_prefix(
    model: nn.Module,
    own: Collection[str],
    state: Mapping[str, Tensor],
    note: Callable[[str], None],
    prefix: str | None,
) -> Mapping[str, Tensor]:
    """Return the state dict under the one prefix under which it has all that `model` needs."""
    groups = needed(own, _ties(model))
    some = [next(iter(group)) for group in groups if len(group) == 1][:8]

    def fits(given: Mapping[str, Tensor]) -> bool:
        keys = fit_weight_norm_keys(given, own).keys()
        return all(any(key in keys for key in group) for group in groups)

    return fit_prefix(state, fits, some, note, prefix)


def _ties(model: nn.Module) -> list[list[str]]:
    """Return the keys of each parameter that has more than one."""
    keys: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    return [found for found in keys.values() if len(found) > 1]


def write_state(state: Mapping[str, Any], path: Path, suffix: str) -> None:
    """Write a state dict into a path, as a file of a suffix holds it.

    Args:
        state: what is written, by key.
        path: where: a name for the moment, without a suffix of its own.
        suffix: of the final name: .safetensors, or else anything that `torch.save` writes.

    Raises:
        CheckpointError: something in it is nothing that safetensors holds.
        OSError: the system does not take the file.
    """
    (_write_safetensors if suffix == ".safetensors" else _write_pickle)(state, path)


def _write_safetensors(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict as safetensors into a path, tensor by tensor.

    Written here, since the library's writer renames a file of its own, and a file without a name
    has no folder.

    Raises:
        CheckpointError: something in it is no tensor, or of a type that the format has not.
    """
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise CheckpointError(f"{key} is no plain tensor; write a .pt file")
        if value.dtype not in names or value.is_quantized:
            raise CheckpointError(f"{key} is of {value.dtype}, which safetensors has not")
        tensors[key] = (names[value.dtype], tuple(value.shape), value.nbytes)
    head, _ = header_of(tensors, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(head)
        for value in state.values():
            flat = value.detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def _write_pickle(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict with `torch.save` into a path; raise OSError where the system refuses."""
    try:
        # A stream: the archive of a path would hold the path's name.
        with path.open("wb") as stream:
            torch.save(state, stream)
    except RuntimeError as error:
        # The archive writer fails once more while it closes, over what the system said.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
