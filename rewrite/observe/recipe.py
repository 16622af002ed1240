"""The recipe of an observed fold, as plain data, and the arithmetic of the layers that absorb it.

    s = a.w + c,  t = b            of the norm
    W[.., i, ..] <- W[.., i, ..] . s[channel of i]         of every reader
    bias         <- bias + sum_i W[.., i, ..] . t[channel of i]
    w <- (1 - c) / a,  b <- 0      or both gone, where the norm's class can do without

Computed in float64, in blocks of rows, and rounded once. `rewrite.fold.executor` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine
from rewrite.weights.scaling import Scaling
from rewrite.weights.tensor_recipe import Exact, TensorStore, scale_in_files, store_dtype

KIND = "fold-observed"

BLOCK = 1 << 22
"""Elements that are computed in float64 at a time."""


@dataclass(frozen=True, eq=False)
class PlainRecipe:
    """A recipe that a report holds as JSON: its fields by name, beside what it does.

    Attributes:
        kind: what it does, the value of the key "do".
        edit_keys: the keys that describe one edited tensor.
        lists: the fields that are tuples, beside `edits`.
    """

    kind: ClassVar[str]
    edit_keys: ClassVar[tuple[str, ...]]
    lists: ClassVar[tuple[str, ...]]

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """Return the recipe that a report holds.

        Raises:
            KeyError: a field, or a key of an edit, is missing.
        """
        held = {field.name: data[field.name] for field in fields(cls)}
        edits = tuple({key: edit[key] for key in cls.edit_keys} for edit in data["edits"])
        return cls(**{**held, **{key: tuple(data[key]) for key in cls.lists}, "edits": edits})

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        held = asdict(self)
        edits = [dict(edit) for edit in held["edits"]]
        return {"do": self.kind, **held, **{key: list(held[key]) for key in self.lists},
                "edits": edits}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ReaderRecipe(PlainRecipe):
    """A norm whose affine part goes into the tensors that read it.

    Attributes:
        weight, bias: the names of the norm's tensors; a bias of None adds nothing.
        factor, offset: a and c of the scale a.w + c.
        edits: the tensors that absorb it: names, axis of inputs, which part, channel by place.
        neutral: what becomes of the norm's tensors where it keeps them, by name.
        gone: those that it loses.
    """

    kind = KIND
    edit_keys = (
        "weight", "axis", "channels", "parts", "bias", "has_bias", "bias_part", "shifts", "into",
        "aliases",
    )  # fmt: skip
    lists = ("gone",)

    weight: str
    factor: float
    offset: float
    bias: str | None
    edits: tuple[Mapping[str, Any], ...]
    neutral: Mapping[str, float]
    gone: tuple[str, ...]

    @property
    def target(self) -> str:
        """The name of the norm."""
        return self.weight.rpartition(".")[0] or self.weight

    @property
    def adds(self) -> bool:
        """Whether every layer that absorbs the map can absorb a shift."""
        return all(edit["shifts"] for edit in self.edits)

    def affine(self, read: Callable[[str], Tensor]) -> Affine:
        """Return the norm's map, in float64, made of the tensors that it has now."""
        weight = read(self.weight).detach().reshape(-1).to(torch.float64)
        scale = self.factor * weight + self.offset
        if self.bias is None:
            return Affine(scale, torch.zeros_like(scale))
        return Affine(scale, read(self.bias).detach().reshape(-1).to(torch.float64))

    def absorb(self, affine: Affine, store: TensorStore, unrounded: Exact) -> None:
        """Give every reader its new tensors, and the norm those with which it does nothing.

        Args:
            affine: the norm's map.
            store: what is read and written.
            unrounded: what tensors that were written before are; it is told of the new ones.
        """
        for edit in self.edits:
            weight, names = edit["weight"], (edit["into"], *edit["aliases"])
            scaling = partial(_scaling, edit, affine.scale)
            source = exact(weight, store, unrounded)
            if self.bias is not None and edit["shifts"]:
                given = exact(edit["bias"], store, unrounded) if edit["has_bias"] else None
                dtype = store_dtype(store, edit["bias"] if edit["has_bias"] else weight)
                shifted = partial(_shifted, edit, source, given, affine.shift)
                store.set(edit["bias"], shifted(dtype))
                unrounded[edit["bias"]] = partial(shifted, torch.float64)
            scaled = partial(_scaled, source, scaling)
            if weight in unrounded or not scale_in_files(store, weight, names, scaling):
                new = scaled(store_dtype(store, weight))
                for name in names:
                    store.set(name, new)
            unrounded |= dict.fromkeys(names, partial(scaled, torch.float64))
        for name, neutral in self.neutral.items():
            old = store.get(name)
            store.set(name, torch.full_like(old, neutral))
            unrounded[name] = partial(torch.full, old.shape, neutral, dtype=torch.float64)


def exact(name: str, store: TensorStore, unrounded: Exact) -> Callable[[], Tensor]:
    """Return what computes a tensor as it was before it was rounded, else as it is stored."""
    return unrounded.get(name) or partial(Tensor.detach, store.get(name))


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


def _scaling(
    edit: Mapping[str, Any], scale: Tensor, shape: Sequence[int], device: torch.device
) -> Scaling:
    """Return how a scale multiplies a weight of a shape."""
    axis = edit["axis"]
    channels = _channels(edit["channels"], shape[axis], device)
    parts = tuple((part[0], part[1], part[2]) for part in edit["parts"])
    return Scaling(_at(scale, channels, 1.0), axis, parts)


def _scaled(
    source: Callable[[], Tensor],
    scaling: Callable[[Sequence[int], torch.device], Scaling],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight with the scale in it."""
    old = source()
    if old.device.type == "meta":
        return torch.empty_like(old, dtype=dtype)
    return scaling(old.shape, old.device)(old, dtype)


def _shifted(
    edit: Mapping[str, Any],
    source: Callable[[], Tensor],
    bias: Callable[[], Tensor] | None,
    shift: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the bias with the shift in it; one that appears has an entry for each output."""
    weight = source()
    part, axis = _rows(edit, weight)
    outputs = part.movedim(axis, 1)
    rows = outputs.shape[0]
    old = torch.zeros(rows, dtype=torch.float64, device=part.device) if bias is None else bias()
    new = old.to(dtype, copy=True)
    if part.device.type == "meta":
        return new
    vector = _at(shift, _channels(edit["channels"], weight.shape[axis], weight.device), 0.0)
    start = 0 if edit["bias_part"] is None else edit["bias_part"][0]
    size = max(1, BLOCK // max(1, outputs[0].numel()))
    for begin in range(0, rows, size):
        block = outputs[begin : begin + size].double()
        if block.ndim > 2:
            block = block.flatten(2).sum(2)
        at = slice(start + begin, start + begin + len(block))
        new[at] = (old[at].double() + block @ vector).to(dtype)
    return new
