"""Judge how large the values of a graph are, and what building it would compute.

onnxruntime computes every value that depends on constants alone when it builds a session, whatever
it takes: a file of 200 bytes may hold a product of two matrices of 20,000 x 20,000. So

    sum of bytes(value), multiplications(value)  over the values computed of constants

are held to what the file itself is worth, and every value to the memory that is there. The sizes
are those of onnx's shape inference, which is first kept from values of unbounded rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from rewrite.errors import VerificationError
from rewrite.memory import free_memory
from rewrite.onnx.vetting.constants import with_sizes
from rewrite.onnx.vetting.control_flow import check_control_flow
from rewrite.onnx.vetting.expansion import inlined
from rewrite.onnx.vetting.loops import check_loops
from rewrite.onnx.vetting.nodes import inner_graphs, label
from rewrite.onnx.vetting.work import (
    LEAST_MULTIPLICATIONS,
    MULTIPLICATIONS_A_BYTE,
    RANDOM,
    infer,
    itemsize,
    multiplications,
    nbytes_of,
    sizes_in,
)
from rewrite.onnx.vetting.worker import LEAST_BYTES, Limits, call, deadline

MOST_CONSTANT_BYTES, MOST_TIMES = 1 << 30, 8
"""Constants may be computed of so many bytes, or of so many times those of the file.

ONNX's own test models, whose weights are filled in by a node, make up to 548 MiB of 9 kB.
"""

MOST_AXES = 64
"""A value may have so many axes; numpy knows as many."""


def check_static(place: Path, model: onnx.ModelProto, nbytes: int) -> None:
    """Raise VerificationError where what a graph says of itself costs too much to build it.

    Args:
        place: the file, for messages.
        model: the graph; `check_expansion` has taken it.
        nbytes: what the file and its data hold.

    Raises:
        VerificationError: a value has too many axes or would not fit into memory, or constants are
            computed out of proportion to the file; or judging it did not end.
    """
    _check_sparse(place, model, nbytes)
    call(
        lambda: _check_static(place, model, nbytes),
        Limits(deadline(nbytes)),
        f"{place}: reading its sizes",
        "export it again, or simplify it",
    )


def _check_static(place: Path, model: onnx.ModelProto, nbytes: int) -> None:
    flat = inlined(model)
    check_control_flow(place, flat.graph)
    check_axes(place, flat.graph)
    check_loops(place, flat, nbytes)
    inferred = infer(with_sizes(flat))
    if inferred is None:
        return  # the checker tells of it
    check_values(place, inferred.graph, "the graph itself asks for it: export it anew")
    _check_constants(place, inferred.graph, nbytes)


# -- axes ------------------------------------------------------------------------------------------


def check_axes(place: Path, graph: Any, outer: Mapping[str, int] | None = None) -> None:
    """Raise VerificationError where a value has too many axes, or text grows without bound.

    Gather(x, x) has nearly twice the axes of x, and StringConcat(s, s) twice its text: 40 of them
    are a terabyte. Other operators have no more axes than their operands, or as many as they say.
    """
    axes = dict(outer or {})
    for value in graph.input:
        axes[value.name] = len(value.type.tensor_type.shape.dim)
    vectors: dict[str, int] = {}  # how many numbers the constants of one axis hold
    for tensor in graph.initializer:
        axes[tensor.name] = len(tensor.dims)
        vectors[tensor.name] = tensor.dims[0] if len(tensor.dims) == 1 else MOST_AXES
    texts: dict[str, int] = {}
    for node in graph.node:
        count = _most_axes(node, axes, vectors)
        if count > MOST_AXES and node.op_type.startswith("Gather"):
            raise VerificationError(
                f"{place}: {label(node)}: its value may have {count} axes, at most {MOST_AXES} are "
                "taken"
            )
        concatenations = max((texts.get(name, 0) for name in node.input), default=0)
        concatenations += node.op_type == "StringConcat"
        if concatenations > MOST_AXES:
            raise VerificationError(
                f"{place}: {label(node)}: {concatenations} texts in a row are put together"
            )
        for name in node.output:
            axes[name], texts[name] = count, concatenations
        # Without an output it is the checker that refuses it.
        for attribute in node.attribute if node.op_type == "Constant" and node.output else ():
            dims = attribute.t.dims if attribute.name == "value" else [len(attribute.ints)]
            vectors[node.output[0]] = dims[0] if len(dims) == 1 else MOST_AXES
            axes[node.output[0]] = len(dims)
        for inner in inner_graphs(node):
            check_axes(place, inner, axes)


def _most_axes(node: Any, axes: Mapping[str, int], vectors: Mapping[str, int]) -> int:
    """Return how many axes a value may have; exact where a node or a constant says it."""
    given = [axes.get(name, 0) for name in node.input] or [0]
    kind = node.op_type
    if kind in ("Shape", "Size", "Flatten"):
        return 2 if kind == "Flatten" else 1
    if kind == "Reshape" and len(node.input) == 2:
        return min(vectors.get(node.input[1], max(given)), MOST_AXES)
    if kind in ("Gather", "GatherND"):
        return max(sum(given[:2]) - 1, 0)  # one axis is indexed by all of the other's
    return max(given) + (kind in ("OneHot", "TfIdfVectorizer"))


# -- values ----------------------------------------------------------------------------------------


def check_values(place: Path, graph: Any, advice: str = "pass a smaller --input") -> None:
    """Raise VerificationError where a value of an inferred graph would not fit into memory."""
    most = max(free_memory() // 2, LEAST_BYTES)
    for inner in _with_inner(graph):
        for value in (*inner.value_info, *inner.output):
            needed = nbytes_of(value.type)
            if needed > most:
                sizes = "x".join(str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
                raise VerificationError(
                    f"{place}: value {value.name} of {sizes} would take {needed / 2**30:.0f} GiB, "
                    f"and {most / 2**30:.0f} GiB are to be had; {advice}"
                )


def _with_inner(graph: Any) -> Iterator[Any]:
    todo = [graph]
    while todo:
        one = todo.pop()
        yield one
        todo += [inner for node in one.node for inner in inner_graphs(node)]


# -- constants -------------------------------------------------------------------------------------


def _check_sparse(place: Path, model: onnx.ModelProto, nbytes: int) -> None:
    """Raise VerificationError where tensors that are mostly zeros become too large in full."""
    total = 0
    for graph in _with_inner(model.graph):
        held = [(tensor.values.name, tensor) for tensor in graph.sparse_initializer]
        for node in graph.node:
            held += [
                (label(node), attribute.sparse_tensor)
                for attribute in node.attribute
                if attribute.HasField("sparse_tensor")
            ]
        for name, tensor in held:
            total += max(math.prod(tensor.dims), 0) * itemsize(tensor.values.data_type)
            _check_proportion(f"{place}: {name or 'a sparse constant'}", total, nbytes)


def _check_proportion(where: str, total: int, nbytes: int) -> None:
    most = max(MOST_CONSTANT_BYTES, MOST_TIMES * nbytes)
    if total > most:
        raise VerificationError(
            f"{where}: the file has {nbytes} bytes, and its constants become {total / 2**20:.0f} "
            f"MiB when it is built, at most {most / 2**20:.0f} MiB are taken; export it again "
            "without constants that are computed"
        )


def _check_constants(place: Path, graph: Any, nbytes: int) -> None:
    """Raise VerificationError where building the graph computes too much of constants."""
    shapes, nbytes_of = sizes_in(graph)
    constant = {tensor.name for tensor in graph.initializer} | {""}
    total = count = 0
    for node in graph.node:
        inside = any(True for _ in inner_graphs(node))
        if inside or node.op_type in RANDOM or not constant.issuperset(node.input):
            continue
        constant.update(node.output)
        total += sum(nbytes_of.get(name, 0) for name in node.output)
        _check_proportion(f"{place}: {label(node)}", total, nbytes)
        count += multiplications(node, shapes)
        most = LEAST_MULTIPLICATIONS + MULTIPLICATIONS_A_BYTE * nbytes
        if count > most:
            raise VerificationError(
                f"{place}: {label(node)}: building the graph takes at least {count:.3g} "
                f"multiplications of constants, at most {most:.0g} are taken; "
                "export it again without constants that are computed"
            )
