"""What a graph becomes when its functions are inlined, counted before anything inlines them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from rewrite.errors import VerificationError
from rewrite.onnx.file import open_onnx
from rewrite.onnx.vetting.expansion import check_expansion, inlined

node = helper.make_node
value = helper.make_tensor_value_info
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
PLACE = Path("net.onnx")


def function(name: str, called: list[str]) -> onnx.FunctionProto:
    """Return a function that calls others, of this domain or none, one after the other."""
    nodes = [
        node(kind, [f"v{i}"], [f"v{i + 1}"], domain="d" if kind[0] == "F" else "")
        for i, kind in enumerate(called)
    ]
    return helper.make_function("d", name, ["v0"], [f"v{len(called)}"], nodes, OPSETS)


def model(nodes: list[onnx.NodeProto], functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, [2])]
    )
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=9)


def bomb(levels: int) -> onnx.ModelProto:
    """Return a graph of 2^levels nodes that stands in 2 levels of them."""
    functions = [function(f"F{i}", [f"F{i - 1}" if i else "Relu"] * 2) for i in range(levels)]
    return model([node(f"F{levels - 1}", ["x"], ["y"], domain="d")], functions)


def test_functions_that_double_are_refused_by_their_number() -> None:
    words = r"net.onnx: F31 -> y: the file holds 65 nodes, .* at least 4.29e\+09 of them"
    with pytest.raises(VerificationError, match=words):
        check_expansion(PLACE, bomb(32))


def test_a_bomb_inside_of_a_branch_is_refused() -> None:
    inner = bomb(32)
    branch = helper.make_graph(inner.graph.node, "b", [], [value("y", TensorProto.FLOAT, [2])])
    outer = model(
        [
            node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [1])),
            node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        ],
        inner.functions,
    )
    with pytest.raises(VerificationError, match=r"If -> y: .* 8.59e\+09 of them"):
        check_expansion(PLACE, outer)


@pytest.mark.parametrize("circle", [["F0"], ["F1"]])
def test_functions_that_call_each_other_in_a_circle_are_refused(circle) -> None:
    functions = [function("F0", circle), function("F1", ["F0"])]
    with pytest.raises(VerificationError, match="the function F0 calls itself"):
        check_expansion(PLACE, model([node("F0", ["x"], ["y"], domain="d")], functions))


def test_a_long_chain_of_functions_is_no_recursion_error() -> None:
    functions = [function(f"F{i}", [f"F{i - 1}" if i else "Relu"]) for i in range(5000)]
    with pytest.raises(VerificationError, match="more than 100 deep"):
        check_expansion(PLACE, model([node("F4999", ["x"], ["y"], domain="d")], functions))


def test_a_large_graph_with_functions_is_taken(tmp_path) -> None:
    """2,000 calls of functions of functions: 32,000 nodes, as exporters write them."""
    layer = function("F1", ["F0", "Relu"] * 4)
    step = function("F0", ["Relu", "Neg", "Abs"])
    nodes = [
        node("F1", ["x" if i == 0 else f"h{i}"], ["y" if i == 1999 else f"h{i + 1}"], domain="d")
        for i in range(2000)
    ]
    large = model(nodes, [step, layer])
    check_expansion(PLACE, large)
    assert len(inlined(large).graph.node) == 2000 * 4 * 4
    onnx.save(large, tmp_path / "net.onnx")
    assert open_onnx(tmp_path / "net.onnx").operator_counts == {"F1": 2000}


def test_a_function_that_no_node_calls_costs_nothing() -> None:
    check_expansion(PLACE, model([node("Relu", ["x"], ["y"])], bomb(32).functions))


def nested(depth: int) -> onnx.GraphProto:
    out = value("y", TensorProto.FLOAT, [2])
    if not depth:
        return helper.make_graph([node("Relu", ["x"], ["y"])], "b", [], [out])
    inner = nested(depth - 1)
    branches = node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    return helper.make_graph([branches], "b", [], [out])


@pytest.mark.parametrize(("depth", "taken"), [(12, False), (6, True)])
def test_thousands_of_graphs_inside_of_nodes_are_refused(depth, taken) -> None:
    inner = nested(depth)
    outer = model([node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)])
    if taken:
        check_expansion(PLACE, outer)
    else:
        with pytest.raises(VerificationError, match="holds 16382 graphs inside of its nodes"):
            check_expansion(PLACE, outer)
