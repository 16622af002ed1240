"""Compare two models as deployed: in their own dtype, under `inference_mode`, and with gradients.

    d(x) = max |a(x) - b(x)| / max |a(x)|      own(x) = max |a64(x) - a(x)| / max |a64(x)|

Equality is judged in float64, where right and wrong are far apart. What float64 does not show is
held here: dtype, device and `requires_grad` of the outputs, and a path that only the model's own
dtype or `inference_mode` takes: d is an error where it is large (0.1) and a hundred times own.
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
    """Return how the original is run, and what it returns: without gradients, if it can be so.

    Whatever it raises when it is run with gradients switched off alone goes on to the caller.
    """
    try:
        with isolated(model):
            return torch.inference_mode, call(model, inputs.clone(), seed, torch.inference_mode)
    except Exception:  # noqa: BLE001 - a forward may need what inference_mode takes away
        with isolated(model):
            return torch.no_grad, call(model, inputs.clone(), seed)


def kind_reasons(before: Any, after: Any, compared: Comparison) -> list[str]:
    """Return how the outputs differ in structure, shape, dtype and device."""
    reasons = [*compared.structure, *_container_reasons(before, after, "output")]
    theirs = dict(leaves(after))
    for path, value in leaves(before):
        other = theirs.get(path)
        devices = [t.device for t in (value, other) if isinstance(t, torch.Tensor)]
        if len(set(devices)) == 2:
            reasons.append(f"{path}: {devices[0]} became {devices[1]}")
    return reasons


def _container_reasons(before: Any, after: Any, path: str) -> Iterator[str]:
    """Yield where a list became a tuple, or a tuple a list: `out + (x,)` takes one of them."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() & after.keys():
            yield from _container_reasons(before[key], after[key], f"{path}[{key!r}]")
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if isinstance(before, list) is not isinstance(after, list):
            yield f"{path}: {type(before).__name__} became {type(after).__name__}"
        for place, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from _container_reasons(one, other, f"{path}[{place}]")


def path_reasons(compared: Comparison, own: float) -> list[str]:
    """Return whether a difference in the model's own dtype is larger than any rounding."""
    if compared.max_rel <= max(_LARGE, _TIMES * own):
        return []
    return [
        f"{compared.worst} differs by {compared.max_rel:.1e} relative in the model's own dtype, in "
        f"which the original is {own:.1e} away from float64: another path is taken"
    ]


def same_classes(a: nn.Module, b: nn.Module) -> bool:
    """Return whether modules of two models differ in nothing but layers that became Identity."""
    old, new = Tree(a).names, Tree(b).names
    return all(
        name in new and type(new[name]) in (type(module), nn.Identity)
        for name, module in old.items()
    ) and len(old) == len(new)


def gradient_reasons(
    a: nn.Module, b: nn.Module, inputs: Inputs, seed: int, without: float
) -> list[str]:
    """Return which outputs require gradients in one model alone, where frozen layers excuse none.

    Nor may values differ that do not differ `without` gradients (largest relative difference): a
    forward may take a path of its own where gradients are on.

    What the original itself cannot compute with gradients is not asked of the other.
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
