"""Compare two models as deployed: in their own dtype, under `inference_mode`, and with gradients.

    d(x) = max |a(x) - b(x)| / max |a(x)|      own(x) = max |a64(x) - a(x)| / max |a64(x)|

Equality is judged in float64, where right and wrong are far apart. Checked here is what float64
does not show: dtype, device and `requires_grad` of the outputs, and code that runs only in the
model's own dtype or under `inference_mode`. d counts as an error if it exceeds 0.1 and 100 own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rewrite.equivalence.compare import Comparison, compare
from rewrite.errors import one_line
from rewrite.runtime.inputs import Inputs, Mode, call, with_gradients
from rewrite.runtime.leaves import leaves
from rewrite.runtime.modes import isolated
from rewrite.runtime.tree import Tree

_LARGE, _TIMES = 0.1, 100.0


def deployed_mode(model: nn.Module, inputs: Inputs, seed: int) -> tuple[Mode, Any]:
    """Run the original under `inference_mode` if possible, else `no_grad`; return mode and output.

    What it raises under `no_grad` is not caught.
    """
    try:
        with isolated(model):
            return torch.inference_mode, call(model, inputs.clone(), seed, torch.inference_mode)
    except Exception:  # noqa: BLE001 - a forward may need what inference_mode takes away
        with isolated(model):
            return torch.no_grad, call(model, inputs.clone(), seed)


def kind_reasons(before: Any, after: Any, compared: Comparison) -> list[str]:
    """Return the differences of the outputs in structure, shape, dtype and device."""
    reasons = [*compared.structure, *_container_reasons(before, after, "output")]
    theirs = dict(leaves(after))
    for path, value in leaves(before):
        other = theirs.get(path)
        devices = [t.device for t in (value, other) if isinstance(t, torch.Tensor)]
        if len(set(devices)) == 2:
            reasons.append(f"{path}: {devices[0]} became {devices[1]}")
    return reasons


def _container_reasons(before: Any, after: Any, path: str) -> Iterator[str]:
    """Yield where a list became a tuple or a tuple a list, which breaks code like `out + (x,)`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() & after.keys():
            yield from _container_reasons(before[key], after[key], f"{path}[{key!r}]")
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if isinstance(before, list) is not isinstance(after, list):
            yield f"{path}: {type(before).__name__} became {type(after).__name__}"
        for place, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from _container_reasons(one, other, f"{path}[{place}]")


def path_reasons(compared: Comparison, own: float) -> list[str]:
    """Return the reason if a difference in the model's own dtype is too large for rounding."""
    if compared.max_rel <= max(_LARGE, _TIMES * own):
        return []
    return [
        f"{compared.worst} differs by {compared.max_rel:.1e} relative in the model's own dtype, in "
        f"which the original is {own:.1e} away from float64: another path is taken"
    ]


def same_classes(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models have the same classes, except for layers replaced by Identity."""
    old, new = Tree(a).names, Tree(b).names
    return all(
        name in new and type(new[name]) in (type(module), nn.Identity)
        for name, module in old.items()
    ) and len(old) == len(new)


def gradient_reasons(
    a: nn.Module, b: nn.Module, inputs: Inputs, seed: int, without: float
) -> list[str]:
    """Return the differences of two models that only show with gradients enabled.

    Outputs must require gradients in both models or in neither (unless a frozen layer explains
    it), and their values may not differ more than without gradients: a forward may branch on
    `torch.is_grad_enabled()`. Nothing is checked if the original fails with gradients.

    Args:
        a: the original.
        b: the rewritten model.
        inputs: what both are run on.
        seed: of the random numbers that a forward draws.
        without: the largest relative difference without gradients.
    """
    try:
        with isolated(a):
            before = call(a, inputs.clone(), seed, with_gradients)
    except Exception:  # noqa: BLE001 - a forward may raise anything
        return []
    try:
        with isolated(b):
            returned = call(b, inputs.clone(), seed, with_gradients)
    except Exception as error:  # noqa: BLE001 - likewise
        return [f"the rewritten model fails with gradients: {one_line(error)}"]
    trains = all(p.requires_grad for p in b.parameters() if p.is_floating_point())
    after = dict(leaves(returned))
    compared = compare(before, returned, dtypes=False)
    reasons = []
    if compared.max_rel > max(_LARGE, _TIMES * without):
        reasons.append(
            f"{compared.worst} differs by {compared.max_rel:.1e} relative with gradients, and by "
            f"{without:.1e} without: another path is taken"
        )
    for path, value in leaves(before):
        other = after.get(path)
        if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
            continue
        if other.requires_grad and not value.requires_grad:
            reasons.append(f"{path}: requires_grad became True")
        elif value.requires_grad and not other.requires_grad and trains:
            reasons.append(f"{path}: requires_grad became False")
        elif value.dtype != other.dtype:
            was, now = (str(t.dtype).removeprefix("torch.") for t in (value, other))
            reasons.append(f"{path}: {was} became {now} with gradients")
    return reasons
