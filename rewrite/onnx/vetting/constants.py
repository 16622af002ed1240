"""Compute the constants that decide sizes, such as 65536 * 65536 in front of an Expand.

Shape inference knows a size that is written in the file, and few that are computed from those.
Only small tensors are computed here, by onnx's own reference, and only operators whose value is
about as large as their operands: at most an element for each pair of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rewrite.onnx.vetting.nodes import all_nodes

MOST_ELEMENTS = 256
"""A tensor of more elements holds no sizes."""


SIZES = {
    "ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,), "Range": (0, 1, 2), "Pad": (1,),
    "Resize": (2, 3), "Upsample": (1,), "OneHot": (1,), "Reshape": (1,), "Unsqueeze": (1,),
    "HannWindow": (0,), "HammingWindow": (0,), "BlackmanWindow": (0,), "Col2Im": (1, 2),
    "CenterCropPad": (1,), "MaxUnpool": (2,), "AffineGrid": (1,), "DFT": (1,), "STFT": (1, 3),
    "MelWeightMatrix": (0, 1), "Slice": (1, 2, 3, 4), "TopK": (1,), "Split": (1,),
}  # fmt: skip
"""Which operands of an operator say how large its value is."""

NO_LARGER = frozenset((
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "Div", "Equal", "Exp", "Floor", "Gather",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod",
    "Mul", "Neg", "Not", "Or", "Pow", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "Reshape", "Round", "Shape", "Sign", "Size", "Slice", "Sqrt", "Squeeze", "Sub",
    "Sum", "Unsqueeze", "Where", "Xor", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    "CumSum", "Split", "Constant",
))  # fmt: skip
"""Operators whose value is about as large as their operands."""

_GROWING = frozenset((
    "Loop", "Scan", "SequenceAt", "ConcatFromSequence", "SequenceMap", "StringConcat",
))  # fmt: skip

_REFUSALS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def with_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in which constants that decide sizes are initializers; may be `model`."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    computed = _computed(model)
    wanted = list(_wanted(model.graph, known, computed))
    needed = _slice(wanted, computed)
    if not needed:
        return model
    values: dict[str, Any] = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in known.items()
        if math.prod(tensor.dims) <= MOST_ELEMENTS
    }
    found = []
    for node in needed:
        outputs = value_of(model, node, values)
        for name, value in zip(node.output, outputs, strict=False):
            if value.size <= MOST_ELEMENTS:
                values[name] = value
                found.append(numpy_helper.from_array(value, name))
    result = onnx.ModelProto()
    result.CopyFrom(model)
    made = {tensor.name for tensor in found}
    kept = [node for node in result.graph.node if not made.intersection(node.output)]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    result.graph.initializer.extend(found)
    return result


def has_open_sizes(model: onnx.ModelProto) -> bool:
    """Return whether the size of some value depends on the content of an input, not on its shape.

    So it may where an operand that says a size is computed of more than constants and shapes, and
    in loops.
    """
    known = {tensor.name for tensor in model.graph.initializer} | {""}
    for node in all_nodes(model.graph):
        if node.op_type in _GROWING:
            return True
        places = SIZES.get(node.op_type, ())
        if node.op_type != "Reshape" and any(n not in known for n in _operands(node, places)):
            return True
        computed = node.op_type in NO_LARGER or node.op_type in ("Range", "ConstantOfShape")
        if node.op_type in ("Shape", "Size") or (computed and known.issuperset(node.input)):
            known.update(node.output)
    return False


def _operands(node: Any, places: Any) -> list[str]:
    return [node.input[place] for place in places if place < len(node.input)]


def _computed(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the nodes that compute a constant of constants, by what they compute."""
    constant = {tensor.name for tensor in model.graph.initializer} | {""}
    nodes: dict[str, Any] = {}
    for node in model.graph.node:
        if node.op_type in NO_LARGER and constant.issuperset(node.input):
            for name in node.output:
                nodes[name] = node
                constant.add(name)
    return nodes


def _wanted(graph: Any, known: Any, computed: dict[str, Any]) -> Iterator[str]:
    """Yield the computed constants that decide the size of a value."""
    for node in graph.node:
        for name in _operands(node, SIZES.get(node.op_type, ())):
            if name in computed and name not in known:
                yield name


def _slice(wanted: list[str], computed: dict[str, Any]) -> list[Any]:
    """Return the nodes that these constants need, each behind those that it needs itself."""
    order: dict[int, Any] = {}
    todo = [(name, False) for name in reversed(wanted)]
    while todo:
        name, ready = todo.pop()
        node = computed.get(name)
        if node is None or id(node) in order:
            continue
        if ready:
            order[id(node)] = node
        else:
            todo.append((name, True))
            todo += [(inner, False) for inner in node.input]
    return list(order.values())


def value_of(model: onnx.ModelProto, node: Any, values: dict[str, Any]) -> list[Any]:
    """Return what a node computes of small constants; nothing where that is not known."""
    if node.op_type == "Constant":
        if node.attribute and node.attribute[0].type == onnx.AttributeProto.TENSOR:
            tensor = node.attribute[0].t
            if math.prod(tensor.dims) > MOST_ELEMENTS:
                return []
    elif any(name and name not in values for name in node.input):
        return []
    graph = helper.make_graph(
        [node],
        "node",
        [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(node.input) if name],
        [helper.make_empty_tensor_value_info(name) for name in node.output if name],
    )
    from onnx.reference import ReferenceEvaluator  # many modules, and seldom needed

    try:
        versions = {entry.domain: entry.version for entry in model.opset_import}
        runner = ReferenceEvaluator(graph, opsets=versions)
        with np.errstate(all="ignore"):
            found = runner.run(None, {name: values[name] for name in node.input if name})
    except _REFUSALS:
        return []  # not known; what is wrong with it is for the checker to say
    return [np.asarray(value) for value in found]
