"""ONNX files of few bytes that become gigabytes, or do not end, when a session is built of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("d", 1)]


def graphs() -> Iterator[tuple[str, bytes]]:
    """Yield every file by its name."""
    yield from _functions()
    yield from _constants()
    yield from _growing()
    yield "branches.onnx", _branches()


def _functions() -> Iterator[tuple[str, bytes]]:
    """Yield functions that call the one before twice, and one that calls itself."""
    doubling = [_function(i, f"F{i - 1}" if i else "Relu") for i in range(32)]
    yield "function_bomb.onnx", _graph([_node("F31", "x", "s", domain="d")], {}, doubling)
    itself = [_function(0, "F0")]
    yield "recursive.onnx", _graph([_node("F0", "x", "s", domain="d")], {}, itself)


def _constants() -> Iterator[tuple[str, bytes]]:
    """Yield constants that are small where they stand, and large once they are computed."""
    fill = _node("ConstantOfShape", "n", "s")
    yield "filled.onnx", _graph([fill], {"n": [1 << 16, 1 << 17]})
    yield "computed.onnx", _graph([_node("Mul", "m m", "n"), fill], {"m": [1 << 17]})
    product = [_node("ConstantOfShape", "n", "e"), _node("MatMul", "e e", "s")]
    yield "product.onnx", _graph(product, {"n": [20_000, 20_000]})
    ends = {"a": np.float32(0), "b": np.float32(2e10), "c": np.float32(1)}
    yield "range.onnx", _graph([_node("Range", "a b c", "s")], ends)
    yield "tile.onnx", _graph([_node("Tile", "x n", "s")], {"n": [1 << 33]})
    one = numpy_helper.from_array(np.ones(1, np.float32), "s")
    place = numpy_helper.from_array(np.zeros((1, 2), np.int64), "i")
    sparse = helper.make_sparse_tensor(one, place, [1 << 20, 1 << 20])
    yield "sparse.onnx", _graph([], {}, sparse_initializer=[sparse])


def _growing() -> Iterator[tuple[str, bytes]]:
    """Yield chains of nodes that each take the value before twice."""
    yield "doubled.onnx", _graph([*_chain("Concat", "x", 40, axis=0), _node("Abs", "v40", "s")], {})
    cast = _node("Cast", "v40", "s", to=TensorProto.FLOAT)
    yield "axes.onnx", _graph([*_chain("Gather", "v0", 40), cast], {"v0": [[0]]})
    equal = [_node("Equal", "v80 v0", "q"), _node("Cast", "q", "s", to=TensorProto.FLOAT)]
    text = {"v0": np.array(["a"], object)}
    yield "texts.onnx", _graph([*_chain("StringConcat", "v0", 80), *equal], text)


def _branches() -> bytes:
    """Return branches in branches, 16,382 of them."""
    branch = helper.make_graph([_node("Relu", "x", "b0")], "b", [], [_value("b0")])
    for depth in range(1, 13):
        chosen = _node("If", "c", f"b{depth}", then_branch=branch, else_branch=branch)
        branch = helper.make_graph([chosen], "b", [], [_value(f"b{depth}")])
    outer = _node("If", "c", "s", then_branch=branch, else_branch=branch)
    return _graph([outer], {"c": np.array(True)})


def _node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])


def _chain(kind: str, begin: str, count: int, **attributes: Any) -> list[onnx.NodeProto]:
    """Return nodes that each take the one before twice, from `begin` up to `v{count}`."""
    names = [begin, *(f"v{i}" for i in range(1, count + 1))]
    return [
        helper.make_node(kind, [names[i]] * 2, [names[i + 1]], **attributes) for i in range(count)
    ]


def _function(number: int, called: str) -> onnx.FunctionProto:
    domain = "d" if called.startswith("F") else ""
    nodes = [_node(called, a, b, domain=domain) for a, b in ("at", "tb")]
    return helper.make_function("d", f"F{number}", ["a"], ["b"], nodes, _OPSETS)


def _graph(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], functions: Any = (), **more: Any
) -> bytes:
    """Return a graph that multiplies its input by the sum of `s`."""
    tail = [_node("ReduceSum", "s", "r", keepdims=0), _node("Mul", "x r", "y")]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph([*nodes, *tail], "g", [_value("x")], [_value("y")], held, **more)
    model = helper.make_model(made, functions=functions, opset_imports=_OPSETS, ir_version=10)
    content: bytes = model.SerializeToString()
    return content
