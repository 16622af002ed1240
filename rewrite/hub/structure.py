"""The model of a folder without its numbers: the class that `config.json` names, on meta.

The class is one of transformers, never code of the folder. What a class holds under several names
(a head tied to the embedding) stands once in the folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rewrite.errors import CheckpointError, OptionError, one_line
from rewrite.hub.experts import plain_experts
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.merged import Merged
from rewrite.hub.safetensors_file import DTYPES


@dataclass(frozen=True)
class Structure:
    """A model on meta, its folder as its class sees it, and where each of its tensors lies."""

    model: nn.Module
    stored: Mapping[str, str]
    folder: CheckpointFolder


def structure_of(folder: CheckpointFolder) -> Structure:
    """Build the model of a folder on meta, with its types, and find each tensor in the folder.

    Raises:
        CheckpointError: an unknown class, or tensors that the class does not have so.
    """
    model = plain_experts(build(folder, folder.config, meta_buffers=True))
    folder = seen_by(model, folder)
    stored = stored_names(model, folder)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}
    for name, place in stored.items():
        shape = tuple(held[name].shape)
        if folder.entry(place).shape != shape:
            raise CheckpointError(
                f"{folder.path}: {place} has shape {list(folder.entry(place).shape)}, and its "
                f"configuration says {list(shape)}"
            )
        dtype = DTYPES.get(folder.entry(place).dtype)
        if dtype is not None and dtype.is_floating_point and held[name].is_floating_point():
            held[name].data = held[name].data.to(dtype)  # a forward may ask for it
    return Structure(model, stored, folder)


def stored_names(model: nn.Module, folder: CheckpointFolder) -> dict[str, str]:
    """Return the name in the folder of each tensor of the model.

    Raises:
        CheckpointError: the folder lacks one under every name that it has.
    """
    groups: dict[int, list[str]] = {}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    stored: dict[str, str] = {}
    renamed = _loaded_names(model, folder)
    for names in groups.values():
        place = next((renamed[name] for name in names if name in renamed), None)
        if place is None:
            raise CheckpointError(
                f"{folder.path}: has no tensor {names[0]}, which {type(model).__name__} holds; its "
                "class puts tensors together when it loads them, or the folder is of another model"
            )
        stored |= dict.fromkeys(names, place)
    return stored


def build(
    folder: CheckpointFolder, config: Mapping[str, Any], *, meta_buffers: bool = False
) -> nn.Module:
    """Return a model of a configuration, in eval mode, its parameters on meta.

    Args:
        folder: where the configuration comes from, for messages.
        config: what `config.json` says, or a variant of it.
        meta_buffers: put buffers on meta as well; else those that no file holds have their values.

    Raises:
        CheckpointError: transformers does not know the class, or cannot build it.
        OptionError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "a checkpoint folder needs transformers; pip install transformers accelerate"
        ) from error
    names = config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder.path}: {names[0]} is no model class of transformers")
    given = {key: value for key, value in config.items() if key != "transformers_version"}
    context = torch.device("meta") if meta_buffers else _parameters_on_meta()
    try:
        chosen: Any = kind
        settings = chosen.config_class.from_dict(given)
        settings._attn_implementation = "eager"
        with context:
            model: nn.Module = chosen(settings)
    except Exception as error:
        raise CheckpointError(
            f"{folder.path}: {names[0]} cannot be built from its configuration: {one_line(error)}"
        ) from error
    # On its way through the contexts a tied parameter became two.
    model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    return model.eval()


def _loaded_names(model: nn.Module, folder: CheckpointFolder) -> dict[str, str]:
    """Return the name in the folder of each tensor, by what transformers calls it once loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    given: Any = model
    steps = [s for s in get_model_conversion_mapping(given) if isinstance(s, WeightRenaming)]
    found = {str(rename_source_key(name, steps, [])[0]): name for name in folder.places}
    return found | {name: name for name in folder.merged}


def seen_by(model: nn.Module, folder: CheckpointFolder) -> CheckpointFolder:
    """Return a folder with what the class of a model puts together of its tensors."""
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    given: Any = model
    steps = conversion_mapping.get_model_conversion_mapping(given)
    renamings = [s for s in steps if isinstance(s, loading.WeightRenaming)]
    converters = [s for s in steps if isinstance(s, loading.WeightConverter)]
    patterns = {p: step for step in converters for p in step.source_patterns}
    parts: dict[str, dict[str, list[str]]] = {}
    for name in sorted(folder.places, key=_natural):
        whole, pattern = loading.rename_source_key(name, renamings, converters)
        if pattern is not None:
            parts.setdefault(whole, {}).setdefault(pattern, []).append(name)
    merged = {}
    for whole, by in parts.items():
        step = patterns[next(iter(by))]
        axis = _axis_of(step.operations)
        made = Merged(tuple(tuple(by.get(p, ())) for p in step.source_patterns), axis or 1)
        if axis is not None and all(made.groups) and made.fits(folder.entry):
            merged[whole] = made
    return replace(folder, merged=merged)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return what sorts names by the numbers in them."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", name)]


def _axis_of(operations: Any) -> int | None:
    """Return the axis along which stacks of tensors are joined, None for any other conversion."""
    kinds = [type(operation).__name__ for operation in operations]
    if kinds == ["MergeModulelist"] and operations[0].dim == 0:
        return 1
    if kinds == ["MergeModulelist", "Concatenate"] and operations[0].dim == 0:
        return int(operations[1].dim)
    return None


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that a file holds."""
    names = set(model.state_dict(keep_vars=True))
    return {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in names}


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put each parameter on meta when a module takes it in; buffers keep their values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield
