"""Under which configuration the class of a folder holds the tensors of a conversion.

    the names and shapes that the class asks for  =  what the new folder holds

A class is asked by building it, on meta, under the switches that its configuration has: ties of
the head, biases, weight norms, and what kind its norms are. What a switch is called does not
decide: a norm that has to be an RMSNorm is called on numbers, and has to return that formula.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.structure import Structure, build, persistent
from rewrite.runtime.float64 import KeepFloat64

_BIASES = ("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "add_bias_linear")
_WEIGHT_NORMS = ("use_weight_norm", "weight_norm", "apply_weight_norm")
_FLAGS = (*_BIASES, *_WEIGHT_NORMS)
"""What configurations call the wish for biases, and for weight norms."""

_RMS_FLAGS = ("use_rms_norm", "rms_norm", "use_rmsnorm")
_NORM_KINDS = ("norm_type", "layer_norm_type", "normalization", "norm_layer", "norm")
_RMS = {
    "layer_norm": "rms_norm", "layernorm": "rmsnorm", "LayerNorm": "RMSNorm", "layer": "rms",
    "ln": "rms",
}  # fmt: skip
"""What configurations call a LayerNorm, and an RMSNorm in its place."""

_MOST = 4
"""Switches that are turned at once: a configuration has few that matter."""


@dataclass(frozen=True)
class Wanted:
    """What a class has to hold.

    Attributes:
        names: the tensors of the new folder, by the names of the model.
        appeared: those of them that are new.
        gone: the names of tensors that have to be none.
        exchanged: norms that have to be RMSNorms, or may stay LayerNorms.
    """

    names: frozenset[str]
    appeared: frozenset[str]
    gone: frozenset[str] = frozenset()
    exchanged: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Holding:
    """A configuration under which the class holds what is wanted.

    Attributes:
        config: it.
        rms: those of the exchanged norms that are RMSNorms then; the others are as they were.
    """

    config: Mapping[str, Any]
    rms: frozenset[str] = frozenset()


def find_holding(folder: CheckpointFolder, structure: Structure, wanted: Wanted) -> Holding | None:
    """Return the configuration under which the class holds what is wanted, None without one."""
    own = dict(folder.config)
    if not (wanted.appeared or wanted.gone or wanted.exchanged):
        return Holding(own)
    if any(name in structure.stored for name in wanted.appeared):
        own["tie_word_embeddings"] = False
    for changed in _variants(structure.model, own, wanted):
        config = {**own, **changed}
        model = build(folder, config, meta_buffers=True)
        rms = frozenset(n for n in wanted.exchanged if _is_rms(structure.model, model, n))
        if wanted.exchanged and not rms:
            continue
        if _holds(model, wanted, {f"{name}.bias" for name in rms}):
            return Holding(config, rms)
    return None


def present(structure: Structure) -> set[str]:
    """Return the names of a model that stand in its folder: one of those that share a tensor."""
    first = {place: name for name, place in reversed(list(structure.stored.items()))}
    return {place if place in structure.stored else name for place, name in first.items()}


def _variants(model: nn.Module, own: Mapping[str, Any], wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Yield what may be set, the fewest switches first."""
    settings: Any = model.config
    given = {**settings.to_dict(), **own}
    switches: dict[str, Any] = {}
    if wanted.appeared or wanted.gone:
        held = {flag: given.get(flag) for flag in _FLAGS}
        switches |= {flag: not value for flag, value in held.items() if isinstance(value, bool)}
    if wanted.exchanged:
        switches |= {flag: True for flag in _RMS_FLAGS if given.get(flag) is False}
        kinds = {key: _RMS.get(str(given.get(key))) for key in _NORM_KINDS}
        switches |= {key: kind for key, kind in kinds.items() if kind is not None}
    for count in range(min(len(switches), _MOST) + 1):
        for chosen in itertools.combinations(switches, count):
            yield {key: switches[key] for key in chosen}


def _holds(model: nn.Module, wanted: Wanted, dropped: Collection[str]) -> bool:
    """Return whether a class asks for the wanted tensors, without those that RMSNorms drop."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), set()).add(name)
    names = wanted.names - set(dropped)
    gone = wanted.gone | set(dropped)
    return (
        all(group & names for group in groups.values())
        and wanted.appeared <= set(tensors)
        and not gone & set(tensors)
    )


def _is_rms(old: nn.Module, new: nn.Module, name: str) -> bool:
    """Return whether a LayerNorm is an RMSNorm of the same epsilon in the new model."""
    before = old.get_submodule(name)
    try:
        after = new.get_submodule(name)
    except AttributeError:
        return False
    if not isinstance(before, nn.LayerNorm) or isinstance(after, nn.LayerNorm):
        return False
    held = dict(after.named_parameters())
    if list(held) != ["weight"] or held["weight"].shape != torch.Size(before.normalized_shape):
        return False
    random = torch.Generator().manual_seed(0)
    size = before.normalized_shape[0]
    x, weight = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((3, size), (size,))
    )
    x = x * before.eps**0.5  # so small that the epsilon matters
    trial = copy.deepcopy(after).to_empty(device="cpu").double()
    expected = weight * x * (x.square().mean(-1, keepdim=True) + before.eps).rsqrt()
    with torch.no_grad(), KeepFloat64():
        trial.get_parameter("weight").copy_(weight)
        got = trial(x)
    return bool((got - expected).abs().max() <= 1e-9 * expected.abs().max())
