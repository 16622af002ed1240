"""The recipe of a stream that is put through a map, as plain data, and its arithmetic.

    T[.., :, ..] <- T[.., :, ..] M       along one axis of every writer and of every linear reader

`{"do": "map-stream", "map": {"kind", "size", "seed", "inverse"}, "edits": [..], "ones", "needs"}`:
which tensors, which matrix, which seed. Computed in float64 in blocks of rows, and rounded once.
`rewrite.fold.executor` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import CheckpointError
from rewrite.observe.recipe import BLOCK, PlainRecipe, exact
from rewrite.observe.stream_matrices import StreamMap, stream_map
from rewrite.weights.tensor_recipe import Exact, TensorStore, store_dtype

KIND = "map-stream"


@dataclass(frozen=True, eq=False)
class StreamRecipe(PlainRecipe):
    """A residual stream that is put through a map.

    Attributes:
        map: the kind, size, seed and direction of the map, as `stream_map` takes them.
        edits: the tensors that are put through it: names, axis, the tensor that scales it.
        norms: the norms that read the stream.
        ones: tensors that become all ones.
        needs: what tensors have to be everywhere, by name.
    """

    kind = KIND
    edit_keys = ("tensor", "axis", "scale", "alone", "aliases")
    lists = ("norms", "ones")

    map: Mapping[str, Any]
    edits: tuple[Mapping[str, Any], ...]
    norms: tuple[str, ...]
    ones: tuple[str, ...]
    needs: Mapping[str, float]

    def inverse(self) -> StreamRecipe:
        """Return the recipe that turns the stream back; scales that were taken in stay there.

        Raises:
            CheckpointError: what centring took cannot be brought back.
        """
        if self.map["kind"] == "centre":
            raise CheckpointError("a stream that was centred cannot be brought back")
        way = {**self.map, "inverse": not self.map.get("inverse", False)}
        edits = tuple({**edit, "scale": None} for edit in self.edits)
        return replace(self, map=way, edits=edits, ones=())

    def check(self, read: Callable[[str], Tensor]) -> None:
        """Raise where a tensor is not what the plan relied on.

        Raises:
            CheckpointError: the tensor is named.
        """
        for name, wanted in self.needs.items():
            tensor = read(name)
            if tensor.device.type != "meta" and not bool((tensor == wanted).all()):
                raise CheckpointError(f"{name} is not {wanted:g} everywhere: fold the norm first")

    def put_through(self, store: TensorStore, unrounded: Exact) -> None:
        """Give every tensor of the stream its new values.

        Args:
            store: what is read and written.
            unrounded: what tensors that were written before are; it is told of the new ones.
        """
        turned = stream_map(self.map)
        for edit in self.edits:
            name = edit["tensor"]
            scale = None
            if edit["scale"] is not None:
                scale = exact(edit["scale"], store, unrounded)()
            given = exact(name, store, unrounded)
            compute = partial(_mapped, given, edit["axis"], turned, scale)
            new = compute(store_dtype(store, name))
            for place in (name, *edit["aliases"]):
                store.set(place, new)
                unrounded[place] = partial(compute, torch.float64)
        for name in self.ones:
            one = torch.ones_like(store.get(name))
            store.set(name, one)
            unrounded[name] = partial(Tensor.double, one)


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
    size = max(1, BLOCK // max(1, given[0].numel()))
    for begin in range(0, len(given), size):
        block = given[begin : begin + size].double()
        rows = block.reshape(-1, turned.size)
        rows = turned(rows if factor is None else rows * factor)
        made[begin : begin + size] = rows.reshape(block.shape).to(dtype)
    return new
