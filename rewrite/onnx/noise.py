"""Estimate float32 rounding noise in an ONNX graph: stored values perturbed, sums bounded.

    stored:  v -> v (1 + u),  |u| = eps / 2     weights, constants, inputs; eps of their own type
    summed:  |fl(sum v) - sum v| <= sqrt(n) (eps / 2) sum |v|
    dotted:  |fl(w x) - w x|     <= sqrt(n / 2) (eps / 2) |w x|     terms of both signs

The second holds with high probability for n numbers added in any order (Higham & Mary, SIAM J.
Sci. Comput. 41, 2019); one kernel adds pairwise and another one by one, so no measurement of one
tells of another. A norm of n elements inherits it from its mean: its output is off by that much
times rms / sigma of what it normalizes. Short sums need no bound of their own.

Numbers that decide on a shape or an index are sizes and are left alone: 15 rows instead of 16 are
no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, TensorProto, numpy_helper

from rewrite.equivalence.rounding import EXPLAINS, Perturbation
from rewrite.onnx.file import Array, OnnxFile, initializer
from rewrite.onnx.vetting.nodes import all_nodes, inner_graphs, nodes_of

_HALF_EPS = float(np.finfo(np.float32).eps) / 2


_SHORT = 256
"""Sums of fewer numbers round no more than anything else does."""


_MOVED = (TensorProto.FLOAT, TensorProto.FLOAT16)


def perturbed_graph(opened: OnnxFile, seed: int = 0) -> OnnxFile:
    """Return a copy whose stored floats are half an eps off at random, wherever they stand.

    Initializers, `Constant` nodes, those of subgraphs and of local functions; no sizes.
    """
    nudge = Perturbation(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(opened.model)
    sizes = _sizes(copy)
    weights = {
        name: _moved(value, nudge) if name not in sizes else value
        for name, value in opened.weights.items()
    }
    for graph in _graphs(copy):
        for tensor in graph.initializer:
            if tensor.name not in opened.weights and tensor.name not in sizes:
                _move(tensor, nudge)
    for node in nodes_of(copy):
        if node.op_type == "Constant" and not sizes.intersection(node.output):
            for attribute in node.attribute:
                _move_constant(attribute, nudge)
    return replace(opened, model=copy, weights=weights)


def perturbed_feed(feed: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    """Return inputs that are half an eps off; what holds nothing but chosen numbers stays."""
    nudge = Perturbation(seed + 1)
    return {
        name: nudge.stored(torch.from_numpy(np.array(value)), fills=False).numpy()
        if value.dtype in (np.float32, np.float16)
        else value
        for name, value in feed.items()
    }


def _moved(value: Array, nudge: Perturbation) -> Array:
    if value.dtype not in (np.float32, np.float16):
        return value
    return nudge.stored(torch.from_numpy(np.ascontiguousarray(value))).numpy()


def _move(tensor: Any, nudge: Perturbation) -> None:
    if tensor.data_type in _MOVED and tensor.data_location != TensorProto.EXTERNAL:
        value = np.array(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(_moved(value, nudge), tensor.name))


def _move_constant(attribute: Any, nudge: Perturbation) -> None:
    if attribute.type == AttributeProto.TENSOR:
        _move(attribute.t, nudge)
    elif attribute.type == AttributeProto.SPARSE_TENSOR:
        _move(attribute.sparse_tensor.values, nudge)
    elif attribute.type == AttributeProto.FLOATS:
        moved = _moved(np.array(attribute.floats, np.float32), nudge)
        attribute.floats[:] = [float(number) for number in moved]


def _graphs(model: Any) -> Iterator[Any]:
    """Yield the graph and every graph inside its nodes."""
    yield model.graph
    for node in nodes_of(model):
        yield from inner_graphs(node)


# -- sizes ---------------------------------------------------------------------------------------


_SIZE_INPUTS = {
    "Range": (0, 1, 2), "Resize": (1, 2, 3), "Upsample": (1,), "Reshape": (1,), "Expand": (1,),
    "ConstantOfShape": (0,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Pad": (1,), "TopK": (1,),
    "Floor": (0,), "Ceil": (0,), "Round": (0,), "Loop": (0,),
}  # fmt: skip
"""Inputs that say how many or which, and what makes whole numbers of fractions on the way there."""


def _sizes(model: Any) -> set[str]:
    """Return the names that decide on sizes and whose values do not depend on an input's."""
    nodes = list(nodes_of(model))
    producers = {name: node for node in nodes for name in node.output if name}
    varying = _varying(model, nodes)
    pending = [name for node in nodes for name in _size_inputs(node)]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name in found or name in varying:
            continue
        found.add(name)
        node = producers.get(name)
        if node is not None and node.op_type not in ("Shape", "Size"):
            pending += [other for other in node.input if other]
    return found


def _varying(model: Any, nodes: list[Any]) -> set[str]:
    """Return the names of values that depend on what an input holds, not only on its shape."""
    given = {tensor.name for tensor in model.graph.initializer}
    varying = {value.name for value in model.graph.input if value.name not in given}
    for node in nodes:
        inner = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
        read = {*node.input, *(n for graph in inner for m in all_nodes(graph) for n in m.input)}
        if node.op_type not in ("Shape", "Size") and (varying & read):
            varying.update(node.output)
            varying.update(value.name for graph in inner for value in graph.input)
    return varying


def _size_inputs(node: Any) -> list[str]:
    indices = _SIZE_INPUTS.get(node.op_type, ())
    if node.op_type == "Cast" and _attribute(node, "to", 0) not in (1, 10, 11, 16):
        indices = (0,)
    return [node.input[index] for index in indices if index < len(node.input)]


def _attribute(node: Any, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


# -- sums ----------------------------------------------------------------------------------------


Sum = Callable[[Array], float]
"""From what a node reads to how far its output may be off, relative."""


def long_sums(opened: OnnxFile) -> dict[str, list[tuple[str, Sum]]]:
    """Return the graph's sums by the name of what they read: their output's name and its bound."""
    fixed = {t.name: t for t in opened.model.graph.initializer}
    shapes = {name: tuple(tensor.dims) for name, tensor in fixed.items()}
    constants = {
        n.output[0]: n.attribute[0].t
        for n in opened.model.graph.node
        if n.op_type == "Constant" and n.attribute[0].type == AttributeProto.TENSOR
    }

    def values(name: str) -> tuple[int, ...]:
        tensor = fixed.get(name, constants.get(name))
        if tensor is None:
            return ()
        held = initializer(opened, tensor) if name in fixed else numpy_helper.to_array(tensor)
        return tuple(int(v) for v in held.reshape(-1))

    found: dict[str, list[tuple[str, Sum]]] = {}
    for node in opened.model.graph.node:
        bound = _product_of(node, shapes) or _sum_of(node, values)
        if bound is not None:
            found.setdefault(node.input[0], []).append((node.output[0], bound))
    return found


def _sum_of(node: Any, values: Callable[[str], tuple[int, ...]]) -> Sum | None:
    """Return the bound of what a node sums, None where it sums nothing or unknown axes."""
    kind = node.op_type
    if kind in _NORMS:
        return lambda array: _norm_bound(node, array)
    if kind in ("Softmax", "LogSoftmax", "CumSum"):
        default = -1 if kind != "CumSum" else 0
        axis = _attribute(node, "axis", default)
        return lambda array: _random_walk(array.shape[axis] if array.ndim else 1)
    if kind.startswith("Reduce") or kind == "GlobalAveragePool":
        given = _attribute(node, "axes", None)
        if kind == "GlobalAveragePool":
            return lambda array: _reduced(kind, array, tuple(range(2, array.ndim)))
        if given is None and len(node.input) > 1 and node.input[1]:
            given = values(node.input[1]) or None
            if given is None:
                return None
        axes = None if given is None else tuple(given)
        return lambda array: _reduced(kind, array, axes or tuple(range(array.ndim)))
    return None


def _product_of(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> Sum | None:
    """Return the bound of a linear operator, None for any other node."""
    kind = node.op_type
    weight = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
    if kind == "Conv" and weight:
        return lambda array: _dotted(math.prod(weight[1:]))
    if kind == "MatMul":
        return lambda array: _dotted(array.shape[-1] if array.ndim else 1)
    if kind == "Gemm":
        axis = 0 if _attribute(node, "transA", 0) else 1
        return lambda array: _dotted(array.shape[axis])
    return None


def _dotted(count: int) -> float:
    """Return how far a sum of so many numbers of both signs may be off, likewise."""
    return _random_walk(count) * math.sqrt(0.5)


def _random_walk(count: int) -> float:
    """Return how far a sum of so many numbers of one sign may be off, as a noise to be allowed."""
    return math.sqrt(count) * _HALF_EPS / EXPLAINS if count >= _SHORT else 0.0


def _reduced(kind: str, array: Array, axes: tuple[int, ...]) -> float:
    if kind in ("ReduceMax", "ReduceMin", "ReduceProd") or array.dtype.kind != "f":
        return 0.0
    count = math.prod(array.shape[axis] for axis in axes)
    alone = _random_walk(count)
    if not alone or kind in ("ReduceSumSquare", "ReduceL2", "ReduceL1", "ReduceLogSumExp"):
        return alone
    with np.errstate(all="ignore"):
        total = float(np.linalg.norm(array.sum(axes, dtype=np.float64)))
        sizes = float(np.linalg.norm(np.abs(array).sum(axes, dtype=np.float64)))
        bound = alone * sizes / total if total else 0.0
    return bound if math.isfinite(bound) else 0.0


_NORMS = (
    "InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization",
    "SimplifiedLayerNormalization", "MeanVarianceNormalization",
)  # fmt: skip


def _norm_bound(node: Any, array: Array) -> float:
    rows = _grouped(node, array)
    alone = _random_walk(rows.shape[-1])
    if not alone:
        return 0.0
    if node.op_type in ("RMSNormalization", "SimplifiedLayerNormalization"):
        return alone
    with np.errstate(all="ignore"):
        mean = rows.mean(-1, dtype=np.float64)
        variance = np.square(rows - mean[:, None]).mean(-1, dtype=np.float64)
        scale = variance + _attribute(node, "epsilon", 1e-5)
        made = float((variance / scale).mean())
        square = float(((variance + mean**2) / scale).mean())
        bound = alone * math.sqrt(square / made) if made > 0 and square < math.inf else 0.0
    return bound if math.isfinite(bound) else 0.0


def _grouped(node: Any, array: Array) -> Array:
    """Return what a norm reads, one row for what it takes one mean of."""
    if node.op_type == "GroupNormalization":
        groups = array.shape[0] * int(_attribute(node, "num_groups", 1))
    elif node.op_type in ("InstanceNormalization", "MeanVarianceNormalization"):
        groups = math.prod(array.shape[:2])
    else:
        axis = int(_attribute(node, "axis", -1)) % max(1, array.ndim)
        groups = math.prod(array.shape[:axis])
    return array.reshape(groups, -1) if array.size else array.reshape(1, -1)
