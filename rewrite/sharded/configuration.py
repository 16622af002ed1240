"""Under which configuration the class of a folder holds the tensors of a conversion.

    the names and shapes that the class asks for  =  what the new folder holds

A class is asked by building it, on meta, under the switches that its configuration has: ties of
the head, biases, weight norms, and what kind its norms are. What a switch is called does not
decide: a norm that has to be an RMSNorm is called on numbers, and has to return that formula. A
switch that asks for more biases than appear (Llama's `attention_bias` has one of the output, too)
gives them as zeros, to layers that are otherwise what they were.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.graph.spellings import is_plain
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.structure import Structure, build, persistent
from rewrite.observe.new_bias import adds_new_bias
from rewrite.runtime.float64 import KeepFloat64

_FLAG = re.compile(r"(^|_)bias(es)?(_|$)|^(use_|apply_)?weight_norm$")
"""What configurations call the wish for biases (`use_qkv_bias`), and for weight norms."""

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
        zeros: biases of zeros that the class asks for then, with their shapes.
    """

    config: Mapping[str, Any]
    rms: frozenset[str] = frozenset()
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def find_holding(folder: CheckpointFolder, structure: Structure, wanted: Wanted) -> Holding | None:
    """Return the configuration under which the class holds what is wanted, None without one."""
    own = _own(folder, structure, wanted)
    if not (wanted.appeared or wanted.gone or wanted.exchanged):
        return Holding(own)
    for config, model in _models(folder, structure, own, wanted):
        rms = frozenset(n for n in wanted.exchanged if _is_rms(structure.model, model, n))
        if wanted.exchanged and not rms:
            continue
        zeros = _missing(model, wanted, {f"{name}.bias" for name in rms})
        if zeros is None or not _are_new_biases(structure.model, model, zeros):
            continue
        if wanted.appeared <= _apart(model, wanted):
            return Holding(config, rms, {name: tuple(_held(model)[name].shape) for name in zeros})
    return None


def attainable(folder: CheckpointFolder, structure: Structure, wanted: Wanted) -> frozenset[str]:
    """Return the most of the new tensors that the class holds under one configuration."""
    best: frozenset[str] = frozenset()
    untied, given = _own(folder, structure, wanted), dict(folder.config)
    for own in (untied, given) if untied != given else (given,):
        tied = structure.stored.keys() if own is given else ()
        new = wanted.appeared - set(tied)
        for _, model in _models(folder, structure, own, wanted):
            zeros = _missing(model, wanted, ())
            if zeros is not None and _are_new_biases(structure.model, model, zeros):
                best = max(best, new & _apart(model, wanted), key=len)
    return best


def _own(folder: CheckpointFolder, structure: Structure, wanted: Wanted) -> dict[str, Any]:
    """Return the configuration of a folder, without the tie of a head that gets its own weight."""
    untied = any(name in structure.stored for name in wanted.appeared)
    return {**folder.config, "tie_word_embeddings": False} if untied else dict(folder.config)


def present(structure: Structure) -> set[str]:
    """Return the names of a model that stand in its folder: one of those that share a tensor."""
    first = {place: name for name, place in reversed(list(structure.stored.items()))}
    return {place if place in structure.stored else name for place, name in first.items()}


def _models(
    folder: CheckpointFolder, structure: Structure, own: Mapping[str, Any], wanted: Wanted
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Yield configurations and the models that they ask for, the fewest switches first."""
    for changed in _variants(structure.model, own, wanted):
        config = {**own, **changed}
        yield config, build(folder, config, meta_buffers=True)


def _variants(model: nn.Module, own: Mapping[str, Any], wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Yield what may be set, the fewest switches first."""
    settings: Any = model.config
    given = {**settings.to_dict(), **own}
    switches: dict[str, Any] = {}
    if wanted.appeared or wanted.gone:
        held = {flag: value for flag, value in given.items() if _FLAG.search(flag)}
        switches |= {flag: not value for flag, value in held.items() if isinstance(value, bool)}
    if wanted.exchanged:
        switches |= {flag: True for flag in _RMS_FLAGS if given.get(flag) is False}
        kinds = {key: _RMS.get(str(given.get(key))) for key in _NORM_KINDS}
        switches |= {key: kind for key, kind in kinds.items() if kind is not None}
    for count in range(min(len(switches), _MOST) + 1):
        for chosen in itertools.combinations(switches, count):
            yield {key: switches[key] for key in chosen}


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Return what a file holds of a model, by every name."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **persistent(model)}


def _apart(model: nn.Module, wanted: Wanted) -> frozenset[str]:
    """Return the new tensors that a class holds, each apart from all others.

    Some classes tie the head whatever their configuration says (T5's do, and read the wish for
    another scale out of it).
    """
    held = _held(model)
    count = Counter(id(held[name]) for name in wanted.names & held.keys())
    return frozenset(n for n in wanted.appeared & held.keys() if count[id(held[n])] == 1)


def _missing(model: nn.Module, wanted: Wanted, dropped: Collection[str]) -> set[str] | None:
    """Return what a class asks for beyond the wanted tensors; None if it holds one that has to go.

    Args:
        model: of the class.
        wanted: the tensors.
        dropped: those that RMSNorms drop.
    """
    held = _held(model)
    if (wanted.gone | set(dropped)) & held.keys():
        return None
    groups: dict[int, set[str]] = {}
    for name, tensor in held.items():
        groups.setdefault(id(tensor), set()).add(name)
    names = wanted.names - set(dropped)
    return {min(group) for group in groups.values() if not group & names}


def _are_new_biases(old: nn.Module, new: nn.Module, names: Collection[str]) -> bool:
    """Return whether names are biases of linear layers that had none, all else being as it was."""
    if not names:
        return True
    before, after = dict(old.named_modules()), dict(new.named_modules())
    if {n: type(m) for n, m in before.items()} != {n: type(m) for n, m in after.items()}:
        return False
    kinds: dict[type, nn.Module] = {}
    for name in names:
        owner = name.rpartition(".")[0]
        if name != f"{owner}.bias" or before[owner].bias is not None:
            return False
        kinds[type(before[owner])] = before[owner]
    return all(map(_takes_bias, kinds.values()))


def _takes_bias(layer: nn.Module) -> bool:
    """Return whether a layer without a bias adds one that it gets, and is else what it was."""
    if not isinstance(layer, nn.Linear):
        return False
    return is_plain(layer) or adds_new_bias(layer, (1, layer.in_features))


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
