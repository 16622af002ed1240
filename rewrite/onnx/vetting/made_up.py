"""Made-up inputs of a graph: of what it declares, with likely sizes where it leaves them open.

free(axis)  =  no dim_value, or a negative one (as onnxruntime reads it)
size(axis)  =  size(symbol): one symbol on two inputs is one number
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rewrite.errors import VerificationError

Feed = dict[str, np.ndarray[Any, Any]]


_SIDES = (64, 224, 256, 32, 128, 320, 640)

_LENGTHS = (16, 512, 256, 160, 16000)

_MOST_BYTES = 1 << 31


def is_free(dim: Any) -> bool:
    """Return whether a declared size leaves open what it is."""
    return not dim.HasField("dim_value") or dim.dim_value < 0


def symbol_of(dim: Any) -> str:
    """Return the symbol of a free size, "" where it has none; `?` is no symbol."""
    return "" if dim.dim_param in ("?", "None", "-1") else str(dim.dim_param)


def check_shape(path: Path, value: Any, shape: Sequence[int]) -> None:
    """Raise VerificationError where a declared input takes no value of that shape."""
    kind = value.type.tensor_type
    dims = kind.shape.dim
    fits = len(dims) == len(shape) and all(
        is_free(dim) or dim.dim_value == size for dim, size in zip(dims, shape, strict=True)
    )
    if kind.HasField("shape") and not fits:
        wanted = "x".join(dim.dim_param or str(dim.dim_value) for dim in dims)
        given = "x".join(map(str, shape))
        raise VerificationError(f"{path}: input {value.name} is {wanted}, not {given}")


def synthetic_feeds(path: Path, inputs: Sequence[Any], seed: int = 0) -> Iterator[Feed]:
    """Yield random inputs of what a graph declares, with likely sizes where it leaves them open.

    Args:
        path: the file, for messages.
        inputs: the declared inputs of the graph.
        seed: of what is drawn.

    Raises:
        VerificationError: what it declares would not fit into memory.
    """
    # A free axis without a name may be a length, or the batch of a state.
    for inner in (0, 1):
        for side, length in zip(_SIDES, (*_LENGTHS, *_LENGTHS[:2]), strict=True):
            shapes = list(_shapes(inputs, (side, length), inner))
            yield random_feed(path, inputs, shapes, seed)


def _shapes(inputs: Sequence[Any], sizes: tuple[int, int], inner: int) -> Iterator[list[int]]:
    """Yield a shape for each input: of a side, a length, and `inner` for the batch of a state."""
    side, length = sizes
    symbols: dict[str, int] = {}
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        shape = []
        for axis, dim in enumerate(dims):
            likely = 1 if axis == 0 else side if len(dims) >= 4 else length
            symbol = symbol_of(dim)
            if symbol:
                likely = symbols.setdefault(symbol, likely)
            elif inner and len(dims) == 3 and axis == 1:
                likely = inner
            shape.append(likely if is_free(dim) else dim.dim_value)
        yield shape


def random_feed(
    path: Path, inputs: Sequence[Any], shapes: Sequence[Sequence[int]], seed: int = 0
) -> Feed:
    """Return random inputs of these shapes, of the types that a graph declares.

    Raises:
        VerificationError: they would not fit into memory.
    """
    random = np.random.default_rng(seed)
    feed: Feed = {}
    total = 0
    for value, shape in zip(inputs, shapes, strict=True):
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        dtype = np.dtype(kind)
        total += int(np.prod(np.array(shape, object))) * dtype.itemsize if shape else 1
        if total > _MOST_BYTES:
            raise VerificationError(
                f"{path}: input {value.name} of {'x'.join(map(str, shape))} would take "
                f"{total / 2**30:.0f} GiB; pass --input with the sizes that you use"
            )
        if dtype.kind == "f":
            feed[value.name] = random.standard_normal(shape).astype(dtype)
        else:
            feed[value.name] = np.asarray(random.integers(0, 2, shape)).astype(dtype)
    return feed
