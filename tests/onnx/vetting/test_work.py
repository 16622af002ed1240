"""What running a node takes: bytes, and multiplications."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from rewrite.errors import VerificationError
from rewrite.onnx.vetting.work import (
    check_run,
    infer,
    itemsize,
    multiplications,
    nbytes_of,
    shape_of,
    sizes_in,
)

node = helper.make_node
value = helper.make_tensor_value_info


def test_bytes_and_sizes_of_a_type() -> None:
    kind = value("x", TensorProto.FLOAT16, [2, 3]).type
    assert (nbytes_of(kind), shape_of(kind)) == (12, (2, 3))
    open_ = value("x", TensorProto.FLOAT16, [2, "n"]).type
    assert (nbytes_of(open_), shape_of(open_)) == (0, (2, None))
    assert itemsize(TensorProto.DOUBLE) == 8


COUNTS = {
    "MatMul": (node("MatMul", ["a", "b"], ["y"]), {"a": (4, 5), "b": (5, 6), "y": (4, 6)}, 120),
    "Gemm, turned": (
        node("Gemm", ["a", "b"], ["y"], transA=1), {"a": (5, 4), "b": (5, 6), "y": (4, 6)}, 120
    ),
    "Conv": (
        node("Conv", ["x", "w"], ["y"]),
        {"x": (1, 3, 9, 9), "w": (8, 3, 2, 2), "y": (1, 8, 8, 8)}, 8 * 64 * 12,
    ),
    "Einsum": (
        node("Einsum", ["a", "b"], ["y"], equation="ij,jk->ik"),
        {"a": (4, 5), "b": (5, 6), "y": (4, 6)}, 120,
    ),
    "Relu": (node("Relu", ["a"], ["y"]), {"a": (4, 5), "y": (4, 5)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_multiplications_of_a_node(name) -> None:
    layer, shapes, count = COUNTS[name]
    assert multiplications(layer, shapes) == count


def products(size: int, count: int) -> onnx.GraphProto:
    """Return a graph, inferred, that multiplies a matrix by itself again and again."""
    nodes = [node("MatMul", [f"v{i}"] * 2, [f"v{i + 1}"]) for i in range(count)]
    graph = helper.make_graph(
        nodes, "g", [value("v0", TensorProto.FLOAT, [size, size])],
        [value(f"v{count}", TensorProto.FLOAT, None)],
    )  # fmt: skip
    inferred = infer(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert inferred is not None
    assert sizes_in(inferred.graph)[1]["v1"] == 4 * size * size
    return inferred.graph


def test_a_run_may_multiply_as_much_as_its_weights_and_inputs_are_worth() -> None:
    place = Path("net.onnx")
    check_run(place, products(1000, 19), 5000)
    with pytest.raises(VerificationError, match=r"v21: a run takes at least 2.1e\+10 mult"):
        check_run(place, products(1000, 30), 5000)
    check_run(place, products(1000, 30), 4_000_000)
