"""Check that stored tensors are their exact values, correctly rounded to their dtype.

    |stored - exact| = min over the values v of the dtype of |v - exact|      for each element

A pass that computes in float64 and rounds once can report each tensor before rounding. Then no
assumption is needed about the effect of rounding on the model: the exact tensors are compared in
float64, and the rounding is checked by this equation. Tensors that a pass computes in the model's
own precision (the norms of a weight) state how many roundings (`roundings`) they may be off, of
their own size or of that of the terms whose sum they are (`terms`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rewrite.runtime.tree import Tree, join

Exact = Mapping[str, Callable[[], Tensor]]
"""What tensors are before they are rounded, in float64, by qualified name; computed when asked."""


_FLOAT64 = 4 * torch.finfo(torch.float64).eps


def present(model: nn.Module, exact: Exact) -> dict[str, Callable[[], Tensor]]:
    """Return the entries of `exact` whose tensors `model` still has, each by its first name."""
    tree = Tree(model)
    found = {}
    for name, value in exact.items():
        owner, _, attr = name.rpartition(".")
        module = tree.names.get(owner)
        if module is not None and isinstance(_own(module, attr), Tensor):
            found[join(tree.name(module), attr)] = value
    return found


def misrounded(model: nn.Module, exact: Exact) -> list[str]:
    """Return the tensors of `model` that are not their exact values rounded, with the error."""
    tree = Tree(model)
    reasons = []
    for name, value in exact.items():
        owner, _, attr = name.rpartition(".")
        stored = _own(tree.names[owner], attr)
        if stored is not None and (reason := _misrounded(stored.detach(), value)):
            reasons.append(f"{name} {reason}")
    return reasons


def _own(module: nn.Module, attr: str) -> Tensor | None:
    return {**module._parameters, **module._buffers}.get(attr)


def _misrounded(stored: Tensor, value: Callable[[], Tensor]) -> str:
    exact = value()
    if stored.shape != exact.shape:
        return f"has the shape {tuple(stored.shape)}, its exact value {tuple(exact.shape)}"
    nearest = exact.to(stored.dtype)
    if torch.equal(stored, nearest):
        return ""
    off = (stored.double() - exact).abs()
    least = (nearest.double() - exact).abs()
    allowed = least + _FLOAT64 * exact.abs()
    if roundings := getattr(value, "roundings", 0):
        terms = getattr(value, "terms", exact.abs)()
        allowed = allowed + roundings * torch.finfo(stored.dtype).eps * terms
    wrong = ~(off <= allowed)
    if not bool(wrong.any()):
        return ""
    worst = float((off / exact.abs().clamp_min(torch.finfo(torch.float64).tiny))[wrong].max())
    return (
        f"is not what its exact value rounds to ({int(wrong.sum())} of {wrong.numel()} values, by "
        f"up to {worst:.1e} relative)"
    )
