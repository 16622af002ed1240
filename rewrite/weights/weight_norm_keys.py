"""The three spellings of a weight-normed weight in a state dict, and the way between them.

    plain   NAME                                        w
    old     NAME_g, NAME_v                              torch.nn.utils.weight_norm
    new     parametrizations.NAME.original0, .original1 torch.nn.utils.parametrizations.weight_norm

    w = v * (g / ||v||)       the norm over every axis on which g has length 1

No module is needed: the shape of g says which axes were normalized.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from rewrite.weights.tensor_recipe import Exact

_FORMS = ("plain", "old", "new")


@dataclass(frozen=True)
class _Weight:
    """One weight by the module that holds it and its own name."""

    prefix: str
    name: str

    def keys(self, form: str) -> tuple[str, ...]:
        if form == "plain":
            return (f"{self.prefix}{self.name}",)
        if form == "old":
            return (f"{self.prefix}{self.name}_g", f"{self.prefix}{self.name}_v")
        stem = f"{self.prefix}parametrizations.{self.name}.original"
        return (f"{stem}0", f"{stem}1")


def fit_weight_norm_keys(
    state: Mapping[str, torch.Tensor], wanted: Collection[str], exact: Exact | None = None
) -> dict[str, torch.Tensor]:
    """Return `state` with each weight-normed weight in the form that `wanted` spells.

    A weight is converted only if all its keys are in `state`, none of them is wanted as it is, and
    all keys of another form are wanted; everything else is passed on untouched. Plain weights
    become g = ||w||, v = w, with the norm over all axes but the first.

    Args:
        state: it.
        wanted: the keys of the weights that are asked for.
        exact: is told what each weight that becomes plain is in float64, if given; the weight is
            then computed in that, and rounded once.
    """
    fitted = dict(state)
    for weight, form in _weights(state):
        old = weight.keys(form)
        target = next((f for f in _FORMS if f != form and _all_in(weight.keys(f), wanted)), None)
        if target is None or any(key in wanted for key in old):
            continue
        tensors = [fitted.pop(key) for key in old]
        if exact is not None and target == "plain":
            (name,), dtype = weight.keys(target), tensors[-1].dtype
            wide = bake(*(tensor.double() for tensor in tensors))
            fitted[name] = wide.to(dtype)
            exact[name] = partial(torch.Tensor.detach, wide)
            continue
        fitted.update(zip(weight.keys(target), _converted(tensors, form, target), strict=True))
    return fitted


def _all_in(keys: tuple[str, ...], known: Collection[str]) -> bool:
    return all(key in known for key in keys)


def _weights(state: Mapping[str, torch.Tensor]) -> list[tuple[_Weight, str]]:
    """Return each weight that `state` can hold in one of the three forms, with the form."""
    found: list[tuple[_Weight, str]] = []
    for key in state:
        prefix, _, name = key.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if key.endswith(".original0") and "parametrizations." in key:
            head, _, tail = key.removesuffix(".original0").rpartition("parametrizations.")
            found.append((_Weight(head, tail), "new"))
        elif key.endswith("_g") and f"{key[:-2]}_v" in state:
            found.append((_Weight(prefix, name[:-2]), "old"))
        else:
            found.append((_Weight(prefix, name), "plain"))
    return [(weight, form) for weight, form in found if _all_in(weight.keys(form), state)]


def _converted(tensors: list[torch.Tensor], form: str, target: str) -> list[torch.Tensor]:
    if form == "plain":
        (weight,) = tensors
        g = torch.linalg.vector_norm(
            weight, dim=tuple(range(1, weight.dim())), keepdim=True, dtype=_wide(weight)
        )
        return [g.to(weight.dtype), weight]
    return [bake(*tensors)] if target == "plain" else tensors


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def bake(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the weight of g and v; a zero row of v gives zeros."""
    shape = (1,) * v.dim() if g.dim() < v.dim() else tuple(g.shape)
    grouped = v
    if g.dim() > v.dim():
        # Groups of a transposed convolution: g is (groups, 1, outputs / groups, *1).
        grouped = v.reshape(g.shape[0], v.shape[0] // g.shape[0], *v.shape[1:])
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 != grouped.shape[axis])
    norm = grouped.to(_wide(v)).abs()
    if axes:
        norm = torch.linalg.vector_norm(norm, dim=axes, keepdim=True)
    norm = norm.to(v.dtype).to(_wide(v))
    zero = norm == 0
    scale = (g.reshape(shape).to(norm.dtype) / norm.masked_fill(zero, 1)).masked_fill(zero, 0)
    return (grouped * scale).to(v.dtype).reshape(v.shape)
