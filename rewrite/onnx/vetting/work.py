"""What running a node takes, from the sizes of its operands: bytes, and multiplications.

multiplications(product) = elements of its value * length of the axis that is summed over
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rewrite.errors import VerificationError
from rewrite.onnx.vetting.nodes import label

Shape = tuple[int | None, ...]


LEAST_MULTIPLICATIONS, MULTIPLICATIONS_A_BYTE = 20 * 10**9, 10**5
"""A run may do so many multiplications, and so many more for each byte of weights and inputs.

A convolution does one for each of its weights at each place: 250,000 a byte at 1000 x 1000 places,
whose inputs are as many bytes then.
"""

MOST_VALUE_BYTES, VALUE_TIMES = 256 << 20, 128
"""A value may take so many bytes, or so many times those of weights and inputs."""

STEP_MULTIPLICATIONS = 10**4
"""What one step of a recurrent layer takes at the least, in multiplications."""

_RECURRENT = frozenset(("LSTM", "GRU", "RNN"))

# Their value is a number for each pair of an element of theirs and a column of the other.
_PRODUCTS = frozenset(("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "Einsum"))

RANDOM = frozenset((
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
    "Bernoulli",
))  # fmt: skip
"""Operators whose value is another one at each run."""

_KERNELS = frozenset(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"))


def infer(model: onnx.ModelProto, *, data: str = "unknown") -> onnx.ModelProto | None:
    """Return a graph with the shapes that onnx infers, None where it finds them wrong."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=data == "propagated")
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None


def nbytes_of(kind: Any) -> int:
    """Return the bytes of a value of a type, 0 where its sizes are not known."""
    tensor = kind.tensor_type
    if not tensor.elem_type or not tensor.HasField("shape"):
        return 0
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if any(size <= 0 for size in sizes):
        return 0
    return int(math.prod(sizes)) * itemsize(tensor.elem_type)


def itemsize(elem_type: int) -> int:
    """Return the bytes of one element; 1 of a type that numpy does not know."""
    try:
        return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).itemsize)
    except (KeyError, TypeError):
        return 1


def shape_of(kind: Any) -> Shape:
    """Return the sizes of a value of a type, None for each that is not known."""
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def multiplications(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Return about how many multiplications a layer does, 0 of what is no layer."""
    if node.op_type in _RECURRENT:
        return _of_recurrent(node, shapes)
    if node.op_type not in _PRODUCTS and node.op_type not in _KERNELS:
        return 0
    if node.op_type == "Einsum":
        return _of_einsum(node, shapes)
    made = [_count(shapes.get(name, ())) for name in node.output[:1]]
    read = [shapes.get(name, ()) for name in node.input]
    if node.op_type in _PRODUCTS:
        first = read[0] if read else ()
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        inner = first[0 if turned else -1] if first else 1
        return max(made, default=0) * int(inner or 1)
    # At most one multiplication for each pair of an output and a weight of one filter.
    weight = read[1] if len(read) > 1 else ()
    return max(made, default=0) * max(1, _count(weight[1:]))


def sizes_in(graph: Any) -> tuple[dict[str, Shape], dict[str, int]]:
    """Return the sizes and the bytes of the values of an inferred graph, by name."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nbytes = {}
    for value in (*graph.value_info, *graph.output, *graph.input):
        shapes[value.name], nbytes[value.name] = shape_of(value.type), nbytes_of(value.type)
    return shapes, nbytes


def check_run(place: Path, graph: Any, nbytes: int) -> None:
    """Raise VerificationError where a run of an inferred graph takes out of proportion.

    What does not depend on an input is computed when a session is built, and judged before.

    Args:
        place: the file, for messages.
        graph: the graph, inferred for the inputs of the run.
        nbytes: what the file, its data and the inputs hold.
    """
    shapes, bytes_of = sizes_in(graph)
    fed = {value.name for value in graph.input}
    most = MOST_VALUE_BYTES + VALUE_TIMES * nbytes
    count = 0
    for node in graph.node:
        count += multiplications(node, shapes)
        check_multiplications(place, node, count, nbytes)
        if node.op_type not in RANDOM and not fed.intersection(node.input):
            continue
        fed.update(node.output)
        size = max((bytes_of.get(name, 0) for name in node.output), default=0)
        if size > most:
            raise VerificationError(
                f"{place}: {label(node)}: its value would take {size / 2**20:.0f} MiB, at most "
                f"{most / 2**20:.0f} MiB are taken for {nbytes} bytes of weights and inputs; pass "
                "a smaller --input"
            )


def check_multiplications(place: Path, node: Any, count: float, nbytes: int) -> None:
    """Raise VerificationError where a run does too many multiplications for what it is given.

    Args:
        place: the file, for messages.
        node: the node at which there are so many.
        count: how many there are so far.
        nbytes: what the file, its data and the inputs hold.
    """
    most = LEAST_MULTIPLICATIONS + MULTIPLICATIONS_A_BYTE * nbytes
    if count > most:
        raise VerificationError(
            f"{place}: {label(node)}: a run takes at least {count:.3g} multiplications up to "
            f"here, at most {most:.3g} are taken for {nbytes} bytes of weights and inputs; pass a "
            "smaller --input"
        )


def _of_recurrent(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Return steps * (batch * both of the step's products, or what a step takes at the least)."""
    given, weight, state = (shapes.get(name, ()) for name in [*node.input[:3], "", "", ""][:3])
    if len(given) != 3:
        return 0
    batch_first = any(a.name == "layout" and a.i for a in node.attribute)
    steps, batch = (given[1], given[0]) if batch_first else (given[0], given[1])
    products = (batch or 1) * (_count(weight) + _count(state))
    return (steps or 1) * max(products, STEP_MULTIPLICATIONS)


def _of_einsum(node: Any, shapes: Mapping[str, Shape]) -> int:
    equation = next((a.s.decode("utf-8", "replace") for a in node.attribute if a.s), "")
    sizes: dict[str, int] = {}
    for term, name in zip(equation.split("->")[0].split(","), node.input, strict=False):
        letters = term.replace(" ", "").replace("...", "")
        for letter, size in zip(letters, shapes.get(name, ()), strict=False):
            sizes[letter] = size or 1
    return math.prod(sizes.values())


def _count(shape: Iterable[int | None]) -> int:
    return math.prod(size or 1 for size in shape)
