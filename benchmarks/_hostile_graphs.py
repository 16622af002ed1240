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
    yield from _looping()
    yield from _told_by_a_run()
    yield from _working()
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


def _looping() -> Iterator[tuple[str, bytes]]:
    """Yield loops that never end, run too often, or carry more from round to round."""
    stays = [_node("Identity", "go", "stay")]
    add, double = _node("Add", "v one", "w"), _node("Concat", "v v", "w", axis=0)
    yield "endless.onnx", _loop("", [*stays, add])
    yield "most_rounds.onnx", _loop("most", [*stays, add])
    inner = add
    for _ in range(3):
        inner = _node("Loop", "many yes v", "w", body=_body([*stays, inner]))
    yield "loops_in_loops.onnx", _loop("many", [*stays, inner])
    yield "doubled_in_a_loop.onnx", _loop("many", [*stays, double])
    rows = [_node("ConstantOfShape", "long", "rows")]
    scanned = helper.make_graph(
        [_node("Add", "a b", "c"), _node("Identity", "c", "d")],
        "b", [_value("a"), _value("b")], [_value("c"), _value("d")],
    )  # fmt: skip
    scan = helper.make_node("Scan", ["x", "rows"], ["s", "all"], body=scanned, num_scan_inputs=1)
    yield "scanned.onnx", _graph([*rows, scan], {"long": [50_000_000, 1]})


def _told_by_a_run() -> Iterator[tuple[str, bytes]]:
    """Yield graphs of which only a run tells that they do not end, or what they ask for."""
    counted = [_node("GreaterOrEqual", "i zero", "stay")]
    add, double = _node("Add", "v one", "w"), _node("Concat", "v v", "w", axis=0)
    yield "counted.onnx", _loop("", [*counted, add])
    yield "doubled_while.onnx", _loop("", [*counted, double])
    put = [_node("SequenceInsert", "v big", "w"), _node("ConstantOfShape", "long", "big")]
    body = _body([*counted, *reversed(put)], sequence=True)
    of_sequence = [
        _node("SequenceConstruct", "x", "q"),
        helper.make_node("Loop", ["", "yes", "q"], ["z"], body=body),
        _node("ConcatFromSequence", "z", "s", axis=0),
    ]
    yield "sequence.onnx", _graph(of_sequence, _LOOP | {"long": [1 << 20]})
    size = [_node("Cast", "x", "i", to=TensorProto.INT64), _node("Mul", "i zeros", "z")]
    size += [_node("Add", "z long", "n"), _node("ConstantOfShape", "n", "e")]
    constants = {"zeros": [0], "long": [1 << 33]}
    yield "asked.onnx", _graph([*size, _node("Abs", "e", "s")], constants)
    two = {"zeros": [0], "long": [20_000, 20_000]}
    yield "product_asked.onnx", _graph([*size, _node("MatMul", "e e", "s")], two)


def _working() -> Iterator[tuple[str, bytes]]:
    """Yield graphs of few bytes that compute for minutes, on values of no great size."""
    weights = {"w": np.ones((1, 24, 1), np.float32), "r": np.ones((1, 24, 8), np.float32)}
    gru = helper.make_node("GRU", ["e", "w", "r"], ["", "s"], hidden_size=8)
    steps = _node("ConstantOfShape", "long", "e")
    yield "recurrent.onnx", _graph([steps, gru], weights | {"long": [10**7, 1, 1]})
    random = _node("RandomNormal", "", "e", shape=[1 << 14, 1 << 14])
    yield "random.onnx", _graph([random, _node("Softmax", "e", "s")], {})
    terms = ",".join(f"{a}{b}" for a, b in zip("abcdefgh", "ijklmnop", strict=True))
    fill = _node("RandomNormal", "", "e", shape=[100, 100])
    einsum = helper.make_node("Einsum", ["e"] * 8, ["s"], equation=f"{terms}->a")
    yield "einsum.onnx", _graph([fill, einsum], {})
    chain = [_node("RandomNormal", "", "v0", shape=[3000, 3000])]
    chain += [*_chain("MatMul", "v0", 50), _node("Abs", "v50", "s")]
    yield "products.onnx", _graph(chain, {})
    unknown = helper.make_node("Run", ["x"], ["s"], domain="d")
    yield "unknown.onnx", _graph([unknown], {})


_LOOP: dict[str, Any] = {
    "yes": np.array(True), "one": np.ones(1, np.float32), "zero": np.int64(0),
    "many": np.int64(100_000), "most": np.int64((1 << 63) - 1),
}  # fmt: skip


def _loop(rounds: str, nodes: list[onnx.NodeProto]) -> bytes:
    return _graph([helper.make_node("Loop", [rounds, "yes", "x"], ["s"], body=_body(nodes))], _LOOP)


def _body(nodes: list[onnx.NodeProto], *, sequence: bool = False) -> onnx.GraphProto:
    carried = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    carried = helper.make_sequence_type_proto(carried) if sequence else carried
    whole, flag = (helper.make_tensor_type_proto(kind, []) for kind in (TensorProto.INT64, 9))
    make = helper.make_value_info
    before = [make("i", whole), make("go", flag), make("v", carried)]
    after = [make("stay", flag), make("w", carried)]
    return helper.make_graph(nodes, "body", before, after)


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
