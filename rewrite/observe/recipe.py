"""The recipe of an observed fold: what it reads and what it writes, as plain data, and running it.

    s = a.w + c,  t = b            of the norm
    W[.., i, ..] <- W[.., i, ..] . s[channel of i]         of every reader
    bias         <- bias + sum_i W[.., i, ..] . t[channel of i]
    w <- (1 - c) / a,  b <- 0      or both gone, where the norm's class can do without

Computed in float64, in blocks of rows, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError

_BLOCK = 1 << 22
"""Elements that are computed in float64 at a time."""


def run_recipe(
    recipe: Mapping[str, Any],
    read: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None],
    exact: dict[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Run one recipe: read tensors by name, write new ones under theirs.

    Args:
        recipe: of one fold.
        read: returns a tensor by its name.
        write: puts one in its place.
        exact: what tensors that were written before are, unrounded; it is told of the new ones.

    Raises:
        CheckpointError: a norm's weight or bias is not finite, or a shift appears where the recipe
            relied on there being none.
    """
    weight = read(recipe["weight"])
    if weight.device.type == "meta":
        scale = torch.empty(weight.numel(), dtype=torch.float64, device="meta")
    else:
        scale = recipe["factor"] * weight.detach().reshape(-1).double() + recipe["offset"]
    shift = None
    if recipe["bias"] is not None:
        shift = read(recipe["bias"]).detach().reshape(-1).double()
    _check(recipe, scale, shift)
    unrounded = {} if exact is None else exact
    for edit in recipe["edits"]:
        old = read(edit["weight"])
        channels = _channels(edit["channels"], old.shape[edit["axis"]], old.device)
        source = unrounded.get(edit["weight"], partial(Tensor.detach, old))
        if shift is not None and edit["shifts"]:
            bias = read(edit["bias"]) if edit["has_bias"] else None
            given = (
                None if bias is None else unrounded.get(edit["bias"], partial(Tensor.detach, bias))
            )
            shifted = partial(_shifted, edit, source, given, channels, shift)
            write(edit["bias"], shifted(old.dtype if bias is None else bias.dtype))
            unrounded[edit["bias"]] = partial(shifted, torch.float64)
        scaled = partial(_scaled, edit, source, channels, scale)
        new = scaled(old.dtype)
        for name in (edit["into"], *edit["aliases"]):
            write(name, new)
            unrounded[name] = partial(scaled, torch.float64)
    for name, neutral in recipe["neutral"].items():
        write(name, torch.full_like(read(name), neutral))


def _check(recipe: Mapping[str, Any], scale: Tensor, shift: Tensor | None) -> None:
    if scale.device.type == "meta":
        return
    if not bool(scale.isfinite().all()) or (shift is not None and not bool(shift.isfinite().all())):
        raise CheckpointError(f"{recipe['weight']}: a scale or shift is not finite")
    no_shift = [edit["weight"] for edit in recipe["edits"] if not edit["shifts"]]
    if shift is not None and no_shift and bool(shift.any()):
        raise CheckpointError(
            f"{recipe['bias']} is not zero, and {no_shift[0]} was folded for a norm that adds none"
        )


def _channels(channels: int | list[int], size: int, device: torch.device) -> Tensor:
    if isinstance(channels, int):
        return torch.arange(size, device=device)
    return torch.tensor(channels, device=device)


def _at(vector: Tensor, channels: Tensor, neutral: float) -> Tensor:
    """Return the vector at each place, and the neutral value where a place has no channel."""
    vector = vector.to(channels.device)
    return torch.where(channels >= 0, vector[channels.clamp(min=0)], neutral)


def _rows(edit: Mapping[str, Any], tensor: Tensor) -> tuple[Tensor, int]:
    """Return the part of the weight that the reader reads, and its axis of inputs."""
    for axis, start, length in edit["parts"]:
        tensor = tensor.narrow(axis, start, length)
    return tensor, edit["axis"]


def _scaled(
    edit: Mapping[str, Any],
    source: Callable[[], Tensor],
    channels: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight with the scale in it."""
    old = source()
    new = old.to(dtype, copy=True)
    if old.device.type == "meta":
        return new
    (part, axis), (target, _) = _rows(edit, old), _rows(edit, new)
    factor = _at(scale, channels, 1.0)
    across = next(a for a in range(part.ndim) if a != axis)
    size = max(1, _BLOCK // max(1, part.numel() // part.shape[across]))
    view = factor.reshape([-1 if a == axis else 1 for a in range(part.ndim)])
    for begin in range(0, part.shape[across], size):
        length = min(size, part.shape[across] - begin)
        block = part.narrow(across, begin, length).double() * view
        target.narrow(across, begin, length).copy_(block)
    return new


def _shifted(
    edit: Mapping[str, Any],
    source: Callable[[], Tensor],
    bias: Callable[[], Tensor] | None,
    channels: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the bias with the shift in it; one that appears has an entry for each output."""
    part, axis = _rows(edit, source())
    outputs = part.movedim(axis, 1)
    rows = outputs.shape[0]
    old = torch.zeros(rows, dtype=torch.float64, device=part.device) if bias is None else bias()
    new = old.to(dtype, copy=True)
    if part.device.type == "meta":
        return new
    vector = _at(shift, channels, 0.0)
    start = 0 if edit["bias_part"] is None else edit["bias_part"][0]
    size = max(1, _BLOCK // max(1, outputs[0].numel()))
    for begin in range(0, rows, size):
        block = outputs[begin : begin + size].double()
        if block.ndim > 2:
            block = block.flatten(2).sum(2)
        at = slice(start + begin, start + begin + len(block))
        new[at] = (old[at].double() + block @ vector).to(dtype)
    return new
