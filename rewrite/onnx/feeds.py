"""Inputs of an ONNX graph: matched by name, and generated at other sizes for dynamic axes.

    size(axis)  =  size(symbol): one symbol on two inputs is one number

An axis without a symbol varies with those of other inputs that have its size. Other sizes are
filled from the user's own values, so that an index stays one and a mask stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.utils._pytree import tree_map

from rewrite.errors import VerificationError
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.vetting.made_up import Feed, check_shape, is_free, symbol_of
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.leaves import leaves, tensors

BATCHES = (1, 2, 7)


_SCALES = ((0.5, 0.75, 0.625), (1.5, 1.25, 1.75))
"""Other sizes of axes beside the batch: each symbol takes its own, so that none equals another."""


_WHOLE_SCALES = ((2, 1, 3), (1, 2, 1))
"""Tried where those do not fit: models that take multiples of a stride only."""


_LOOKED_AT = 1000
"""Of so many values two different ones at most make a mask."""


@dataclass(frozen=True)
class Resized:
    """Inputs of other sizes than the given ones, and which sizes those are by their symbols."""

    label: str
    inputs: Inputs
    sizes: Mapping[str, int]
    batch_only: bool


def feed_of(opened: OnnxFile, inputs: Inputs) -> Feed:
    """Return inputs by the graph's names: those given by name, the others in order.

    Raises:
        VerificationError: names, number, types or fixed sizes do not match.
    """
    found = dict(zip(_names(opened, inputs), _leaves(inputs), strict=True))
    return {
        value.name: _fitting(opened.path, value, as_array(found[value.name]))
        for value in opened.inputs
    }


def _leaves(inputs: Inputs) -> list[Any]:
    """Return what of inputs is fed: the tensors, in order; numbers of Python are in the graph."""
    return [
        leaf
        for _, leaf in leaves([inputs.args, dict(inputs.kwargs)])
        if isinstance(leaf, torch.Tensor | np.ndarray)
    ]


def _names(opened: OnnxFile, inputs: Inputs) -> list[str]:
    """Return the graph's input for each tensor of `inputs`, in their order."""
    names = [value.name for value in opened.inputs]
    labels = [""] * len(tensors(list(inputs.args)))
    for key, value in inputs.kwargs.items():
        if isinstance(value, torch.Tensor | np.ndarray):
            labels.append(key)
        else:
            labels += [_joined(key, path) for path, _ in _tensor_leaves(value)]
    nested = [name for name in labels if name and name not in names and name not in inputs.kwargs]
    if nested and len(labels) == len(names):
        # The exporter's names of what a dict or a list holds are its own: they go by order.
        labels = [name if name in names else "" for name in labels]
    unknown = [name for name in labels if name and name not in names]
    free = [name for name in names if name not in labels]
    if unknown or labels.count("") != len(free):
        given = [f"{name!r}" for name in labels if name] + [f"{labels.count('')} by position"]
        raise VerificationError(
            f"{opened.path}: the graph's inputs are {', '.join(names)}; given: {', '.join(given)}"
        )
    rest = iter(free)
    return [name or next(rest) for name in labels]


def _tensor_leaves(value: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in leaves(value, ""):
        if isinstance(leaf, torch.Tensor | np.ndarray):
            yield path, leaf


def _joined(key: str, path: str) -> str:
    parts = path.replace("[", ".").replace("]", "").replace("'", "").split(".")
    return "_".join([key, *filter(None, parts)])


def _fitting(path: Path, value: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    kind = value.type.tensor_type
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if array.dtype != wanted:
        if array.dtype.kind == "f" and np.dtype(wanted).kind == "f":
            array = array.astype(wanted)
        else:
            raise VerificationError(
                f"{path}: input {value.name} takes {np.dtype(wanted)}, not {array.dtype}; "
                f"write --input {'x'.join(map(str, array.shape))}:{np.dtype(wanted)}"
            )
    check_shape(path, value, array.shape)
    return array


def accepts(opened: OnnxFile, inputs: Inputs) -> bool:
    """Return whether the graph's own declaration takes inputs of these shapes."""
    try:
        feed_of(opened, inputs)
    except VerificationError:
        return False
    return True


def dynamic_axes(opened: OnnxFile) -> dict[str, dict[int, str]]:
    """Return the axes that each input declares as dynamic, with their names."""
    return {
        value.name: {
            axis: dim.dim_param or "?"
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            if is_free(dim)
        }
        for value in opened.inputs
    }


# -- other sizes ---------------------------------------------------------------------------------


Axes = list[tuple[int, int]]
"""Which axes of which tensors (by their place among the inputs) are one size."""


def free_sizes(opened: OnnxFile, inputs: Inputs) -> dict[str, Axes]:
    """Return the axes that vary together, by what they are called; the batch first."""
    values = {value.name: value for value in opened.inputs}
    groups: dict[str, Axes] = {}
    firsts: list[str] = []
    named = zip(_names(opened, inputs), _leaves(inputs), strict=True)
    for place, (name, tensor) in enumerate(named):
        for axis, dim in enumerate(values[name].type.tensor_type.shape.dim):
            if not is_free(dim):
                continue
            size = int(tensor.shape[axis])
            key = symbol_of(dim) or _like(groups, place, size) or f"{name} axis {axis} = {size}"
            groups.setdefault(key, []).append((place, axis))
            if axis == 0:
                firsts.append(key)
    called = [symbol for symbol in groups if "batch" in symbol.lower()]
    batch = (called or firsts or [""])[0]
    return {key: groups[key] for key in sorted(groups, key=lambda key: key != batch)}


def _like(groups: Mapping[str, Axes], place: int, size: int) -> str:
    """Return the unnamed axis of an earlier input that has this size, "" without one."""
    for key, axes in groups.items():
        if key.endswith(f" = {size}") and all(other != place for other, _ in axes):
            return key
    return ""


def has_batch(opened: OnnxFile, groups: Mapping[str, Axes]) -> bool:
    """Return whether the first of `free_sizes` is a batch: at the front, or called one."""
    first = next(iter(groups), "")
    return bool(groups) and ("batch" in first.lower() or any(a == 0 for _, a in groups[first]))


def resized(opened: OnnxFile, inputs: Inputs, seed: int = 0) -> Iterator[Resized]:
    """Yield inputs at other sizes of every free axis: the batch alone, then the others."""
    groups = free_sizes(opened, inputs)
    given = _leaves(inputs)

    def size_of(symbol: str) -> int:
        place, axis = groups[symbol][0]
        return int(given[place].shape[axis])

    others = list(groups)
    if has_batch(opened, groups):
        symbol = others.pop(0)
        for size in BATCHES:
            if size != size_of(symbol):
                sizes = {symbol: size}
                yield Resized(
                    f"batch {size}", _with_sizes(inputs, groups, sizes, seed), sizes, True
                )
    for scales in (*_SCALES, *_WHOLE_SCALES) if others else ():
        sizes = {
            symbol: _scaled(size_of(symbol), scales[index % len(scales)])
            for index, symbol in enumerate(others)
        }
        if any(sizes[symbol] != size_of(symbol) for symbol in others):
            label = ", ".join(
                f"{symbol.partition(' = ')[0]} {size}" for symbol, size in sizes.items()
            )
            yield Resized(label, _with_sizes(inputs, groups, sizes, seed), sizes, False)


def _scaled(size: int, factor: float) -> int:
    """Return a size times a factor, in steps that the size is made of."""
    step = next(s for s in (32, 16, 8, 4, 2, 1) if size % s == 0 and (size >= 2 * s or s == 1))
    return max(step, round(size * factor / step) * step)


def _with_sizes(
    inputs: Inputs, groups: Mapping[str, Axes], sizes: Mapping[str, int], seed: int
) -> Inputs:
    """Return inputs whose axes have other sizes, filled from their own values."""
    wanted = {
        (place, axis): size for symbol, size in sizes.items() for place, axis in groups[symbol]
    }
    generator = torch.Generator().manual_seed(seed)
    places = iter(range(len(_leaves(inputs))))

    def varied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        place = next(places)
        shape = [wanted.get((place, axis), size) for axis, size in enumerate(leaf.shape)]
        return _refilled(leaf, shape, generator) if shape != list(leaf.shape) else leaf

    return Inputs(tree_map(varied, inputs.args), tree_map(varied, dict(inputs.kwargs)))


def _refilled(tensor: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Return a tensor of another shape out of the values of this one."""
    flat = tensor.detach().reshape(-1)
    if tensor.is_floating_point() and len(set(flat[:_LOOKED_AT].tolist())) > 2:
        count = int(np.prod(shape))
        drawn = torch.randint(0, flat.numel(), (count,), generator=generator)
        return flat[drawn.to(flat.device)].reshape(shape)
    result = tensor.detach()
    for axis, size in enumerate(shape):
        if result.shape[axis] and size != result.shape[axis]:
            index = torch.arange(size, device=result.device) % result.shape[axis]
            result = result.index_select(axis, index)
    return result.clone()


# -- arrays and tensors ---------------------------------------------------------------------------


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return a tensor as a numpy array; bfloat16, which numpy lacks, as float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        plain: np.ndarray[Any, Any] = (
            value.float() if value.dtype == torch.bfloat16 else value
        ).numpy()
        return plain
    return np.asarray(value)


def as_tensor(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return an array of any layout and spelling of its type as a tensor of its own."""
    # numpy has two types of 64 bits, and torch knows one of them.
    plain = np.array(value)
    known = (
        np.dtype(f"{plain.dtype.kind}{plain.dtype.itemsize}") if plain.dtype.kind in "iu" else None
    )
    return torch.from_numpy(plain if known is None else plain.view(known))
