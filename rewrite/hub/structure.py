"""The model of a checkpoint folder on the meta device: the class of `config.json`, no weights.

The class is one of transformers, never code of the folder. A tensor that the class holds under
several names (a head tied to the embedding) is stored once.
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
from rewrite.hub.bounds import check_counts, no_more_parameters
from rewrite.hub.experts import plain_experts
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.merged import Merged
from rewrite.hub.safetensors_file import DTYPES


@dataclass(frozen=True)
class Structure:
    """A model on the meta device, and where its tensors are stored.

    Attributes:
        model: in eval mode, its tensors on meta, in the stored dtypes.
        stored: the name in the folder of each tensor of the model.
        folder: the folder, with the tensors that its class assembles.
    """

    model: nn.Module
    stored: Mapping[str, str]
    folder: CheckpointFolder

    def stored_name(self, name: str) -> str:
        """Return the name in the folder of a tensor of the model; of a new one, its own."""
        return self.stored.get(name, name)


def structure_of(folder: CheckpointFolder) -> Structure:
    """Build the model of a folder on meta, in the stored dtypes, and map its tensors to files.

    Raises:
        CheckpointError: the class is unknown, or the stored tensors do not fit it.
    """
    model, folder, stored = assembled(folder, meta_buffers=True)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}
    for name, place in stored.items():
        dtype = DTYPES[folder.entry(place).dtype]
        if dtype.is_floating_point and held[name].is_floating_point():
            held[name].data = held[name].data.to(dtype)  # a forward may ask for it
    return Structure(plain_experts(model), stored, folder)


def assembled(
    folder: CheckpointFolder, *, meta_buffers: bool
) -> tuple[nn.Module, CheckpointFolder, dict[str, str]]:
    """Return the model on meta, the folder with assembled tensors, and the stored names.

    Transformers ties two stored tensors that its class ties only if they are equal. Where they
    differ, it loads both; here the configuration is changed to untie them.

    Raises:
        CheckpointError: the class is unknown, or the stored tensors do not fit it.
    """
    model = build(folder, folder.config, meta_buffers=meta_buffers)
    seen = seen_by(model, folder)
    if any(different for _, different in _held_twice(model, seen)):
        seen = replace(seen, config={**folder.config, "tie_word_embeddings": False})
        model = build(seen, seen.config, meta_buffers=meta_buffers)
    copies: dict[str, str] = {}
    for (first, *rest), different in _held_twice(model, seen):
        if different:
            raise CheckpointError(
                f"{folder.path}: {first} and {rest[0]} differ, and {type(model).__name__} holds "
                "them as one"
            )
        copies |= dict.fromkeys(rest, first)
    places = {name: shard for name, shard in seen.places.items() if name not in copies}
    seen = replace(seen, places=places, copies=copies)
    stored = stored_names(model, seen)
    _check_tensors(model, seen, stored)
    return model, seen, stored


def _held_twice(model: nn.Module, folder: CheckpointFolder) -> Iterator[tuple[list[str], bool]]:
    """Yield the stored names of each tensor of a model that is stored more than once.

    With each list: whether its copies differ.
    """
    found = _loaded_names(model, folder)
    for names in _groups(model):
        places = list(dict.fromkeys(found[name] for name in names if name in found))
        if len(places) > 1:
            first, *rest = places
            yield places, not all(folder.same(first, other) for other in rest)


def _check_tensors(model: nn.Module, folder: CheckpointFolder, stored: Mapping[str, str]) -> None:
    """Raise CheckpointError where a stored tensor has another shape or kind than in the class."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}
    for name, place in stored.items():
        entry, shape = folder.entry(place), tuple(held[name].shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"{folder.path}: {place} has shape {list(entry.shape)}, and its configuration "
                f"says {list(shape)}"
            )
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or (held[name].is_floating_point() and not dtype.is_floating_point):
            raise CheckpointError(
                f"{folder.path}: {place} is of type {entry.dtype}, which is stored, not computed "
                "with; give a checkpoint in bfloat16, float16 or float32"
            )


def stored_names(model: nn.Module, folder: CheckpointFolder) -> dict[str, str]:
    """Return the name in the folder of each tensor of the model.

    Raises:
        CheckpointError: a tensor is stored under none of its names.
    """
    stored: dict[str, str] = {}
    renamed = _loaded_names(model, folder)
    for names in _groups(model):
        place = next((renamed[name] for name in names if name in renamed), None)
        if place is None:
            raise CheckpointError(
                f"{folder.path}: has no tensor {names[0]}, which {type(model).__name__} holds; its "
                "class puts tensors together when it loads them, or the folder is of another model"
            )
        stored |= dict.fromkeys(names, place)
    return stored


def _groups(model: nn.Module) -> list[list[str]]:
    """Return the names of each persistent tensor of a model; tied names form one list."""
    groups: dict[int, list[str]] = {}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def build(
    folder: CheckpointFolder, config: Mapping[str, Any], *, meta_buffers: bool = False
) -> nn.Module:
    """Build the model of a configuration, in eval mode, its parameters on meta.

    Args:
        folder: where the configuration comes from, for messages.
        config: the contents of `config.json`, or a variant of them.
        meta_buffers: put buffers on meta as well; else non-persistent buffers have their values.

    Raises:
        CheckpointError: transformers does not know the class, or cannot build it; or it counts
            more layers, heads or labels than the tensors of the folder hold.
        OptionError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            "a checkpoint folder needs transformers; pip install transformers accelerate"
        ) from error
    names = config.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise CheckpointError(
            f"{folder.path}: its configuration names no class (architectures); write the one that "
            'its weights are of, as ["LlamaForCausalLM"]'
        )
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder.path}: {names[0]} is no model class of transformers")
    given = without_downloads(config)
    check_counts(folder, given)
    context = torch.device("meta") if meta_buffers else _parameters_on_meta()
    try:
        chosen: Any = kind
        settings = chosen.config_class.from_dict(given)
        settings._attn_implementation = "eager"
        with context, no_more_parameters(folder):
            model: nn.Module = chosen(settings)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder.path}: {names[0]} cannot be built from its configuration: {one_line(error)}"
        ) from error
    # On its way through the contexts a tied parameter became two.
    model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    return model.eval()


def without_downloads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that builds the same structure and fetches nothing.

    Kernels of attention and of experts may be names of the hub, whose code would run, and weights
    of a backbone would be fetched to be replaced by those of the folder.
    """
    made: dict[str, Any] = {}
    for key, value in config.items():
        if key in _FETCHED or key.endswith(_KERNELS):
            continue
        inner = without_downloads(value) if isinstance(value, dict) else value
        made[key] = False if key == "use_pretrained_backbone" else inner
    return made


_FETCHED = frozenset({"transformers_version", "use_kernels", "kernel_config"})
_KERNELS = ("attn_implementation", "attn_implementation_internal", "experts_implementation",
            "experts_implementation_internal")  # fmt: skip


def _loaded_names(model: nn.Module, folder: CheckpointFolder) -> dict[str, str]:
    """Map the name of each tensor once transformers has loaded it to its name in the folder."""
    renamed = _Renaming(model)
    found = {renamed(name, merged=False)[0]: name for name in folder.places}
    return found | {name: name for name in folder.merged}


class _Renaming:
    """The renaming of tensors that transformers does when it loads a folder into a model.

    Attributes:
        converters: by a pattern of stored names, the step that assembles those tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import conversion_mapping
        from transformers import core_model_loading as loading

        given: Any = model
        steps = conversion_mapping.get_model_conversion_mapping(given)
        self._renamings = [s for s in steps if isinstance(s, loading.WeightRenaming)]
        self._converters = [s for s in steps if isinstance(s, loading.WeightConverter)]
        self.converters = {p: step for step in self._converters for p in step.source_patterns}
        self._prefix = str(given.base_model_prefix)
        self._names: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        self._rename: Any = loading.rename_source_key

    def __call__(self, name: str, *, merged: bool = True) -> tuple[str, str | None]:
        """Return a tensor's name once loaded, and the pattern of names it is assembled from.

        Args:
            name: its name in the folder.
            merged: whether steps that assemble tensors apply; else the pattern is None.
        """
        converters = self._converters if merged else []
        found, pattern = self._rename(name, self._renamings, converters, self._prefix, self._names)
        if found not in self._names and name in self._names:
            found, pattern = self._rename(name, [], [], self._prefix, self._names)
        return str(found), pattern


def seen_by(model: nn.Module, folder: CheckpointFolder) -> CheckpointFolder:
    """Return a folder with the tensors that the class of a model assembles from stored ones."""
    renamed = _Renaming(model)
    parts: dict[str, dict[str, list[str]]] = {}
    for name in sorted(folder.places, key=_natural):
        whole, pattern = renamed(name)
        if pattern is not None:
            parts.setdefault(whole, {}).setdefault(pattern, []).append(name)
    merged = {}
    for whole, by in parts.items():
        step = renamed.converters[next(iter(by))]
        axis = _axis_of(step.operations)
        made = Merged(tuple(tuple(by.get(p, ())) for p in step.source_patterns), axis or 1)
        if axis is not None and all(made.groups) and made.fits(folder.entry):
            merged[whole] = made
    return replace(folder, merged=merged)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that compares the numbers in names as numbers."""
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
    """Return the persistent buffers of a model, by qualified name."""
    names = set(model.state_dict(keep_vars=True))
    return {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in names}


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters on meta as modules register them; buffers keep their values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield
