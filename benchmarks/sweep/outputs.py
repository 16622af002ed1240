"""Compare the outputs of two models: dictionaries, lists and dataclasses of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield every tensor of a nested output in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)
    elif hasattr(output, "__dict__"):
        yield from tensors(vars(output))


def all_finite(output: Any) -> bool:
    """Return whether no tensor of an output holds NaN or infinity."""
    return all(bool(t.isfinite().all()) for t in tensors(output) if t.is_floating_point())


def same_shapes(old: Any, new: Any, *, free_length: bool) -> bool:
    """Return whether two outputs have the same tensors by shape and dtype.

    With `free_length` the first axis may differ: the number of boxes depends on the values.
    """
    first, second = list(tensors(old)), list(tensors(new))
    start = 1 if free_length else 0
    return len(first) == len(second) and all(
        a.ndim == b.ndim and a.shape[start:] == b.shape[start:] and a.dtype == b.dtype
        for a, b in zip(first, second, strict=True)
    )


def relative_difference(old: Any, new: Any) -> float:
    """Return the largest difference of two outputs, relative to the largest value of each tensor.

    Outputs of other shapes differ by infinity.
    """
    if not same_shapes(old, new, free_length=False):
        return float("inf")
    worst = 0.0
    for a, b in zip(tensors(old), tensors(new), strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a.abs().max()) or 1.0
            difference = float((a.double() - b.double()).abs().max()) / scale
            worst = max(worst, difference if difference == difference else float("inf"))
        elif not a.is_floating_point() and not torch.equal(a, b):
            return float("inf")
    return worst
