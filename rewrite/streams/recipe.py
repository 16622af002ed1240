"""The recipe of a stream that was put through a map, as plain data, and running it.

    T[.., :, ..] <- T[.., :, ..] M       along one axis of every writer and of every linear reader

`{"do": "map-stream", "map": {"kind", "size", "seed", "inverse"}, "edits": [..], "ones", "needs"}`:
which tensors, which matrix, which seed. Computed in float64 in blocks of rows, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError
from rewrite.streams.matrices import StreamMap, stream_map

_BLOCK = 1 << 22
"""Elements that are computed in float64 at a time."""


def run_stream_recipe(
    recipe: Mapping[str, Any],
    read: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None],
    exact: dict[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Run one recipe: read tensors by name, write new ones under theirs.

    Args:
        recipe: of one stream.
        read: returns a tensor by its name.
        write: puts one in its place.
        exact: what tensors that were written before are, unrounded; it is told of the new ones.

    Raises:
        CheckpointError: a tensor is not what the recipe relies on.
    """
    unrounded = {} if exact is None else exact
    check_needs(recipe, read)
    turned = stream_map(recipe["map"])
    for edit in recipe["edits"]:
        old = read(edit["tensor"])
        scale = None
        if edit["scale"] is not None:
            held = read(edit["scale"]).detach()
            scale = unrounded.get(edit["scale"], partial(Tensor.detach, held))()
        given = unrounded.get(edit["tensor"], partial(Tensor.detach, old))
        compute = partial(_mapped, given, edit["axis"], turned, scale)
        new = compute(old.dtype)
        for name in (edit["tensor"], *edit["aliases"]):
            write(name, new)
            unrounded[name] = partial(compute, torch.float64)
    for name in recipe["ones"]:
        one = torch.ones_like(read(name))
        write(name, one)
        unrounded[name] = partial(Tensor.double, one)


def check_needs(recipe: Mapping[str, Any], read: Callable[[str], Tensor]) -> None:
    """Raise if a norm has a weight where the recipe relied on there being none.

    Raises:
        CheckpointError: it has; the tensor is named.
    """
    for name, wanted in recipe["needs"].items():
        tensor = read(name)
        if tensor.device.type != "meta" and not bool((tensor == wanted).all()):
            raise CheckpointError(f"{name} is not {wanted:g} everywhere: fold the norm first")


def _mapped(
    source: Callable[[], Tensor],
    axis: int,
    turned: StreamMap,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return a tensor put through a map along one axis."""
    old = source()
    new = torch.empty_like(old, dtype=dtype, memory_format=torch.contiguous_format)
    if old.device.type == "meta":
        return new
    given, made = old.movedim(axis, -1), new.movedim(axis, -1)
    if given.ndim == 1:
        given, made = given[None], made[None]
    factor = None if scale is None else scale.reshape(-1).double()
    size = max(1, _BLOCK // max(1, given[0].numel()))
    for begin in range(0, len(given), size):
        block = given[begin : begin + size].double()
        rows = block.reshape(-1, turned.size)
        rows = turned(rows if factor is None else rows * factor)
        made[begin : begin + size] = rows.reshape(block.shape).to(dtype)
    return new
