"""The nodes of a graph, those inside of nodes included, and what messages call them."""

from __future__ import annotations

from onnx import TensorProto, helper

from rewrite.onnx.vetting.nodes import all_nodes, inner_graphs, label

node = helper.make_node


def branch(name: str) -> object:
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([node("Relu", ["x"], [name])], name, [], [out])


def test_nodes_inside_of_nodes_are_yielded_behind_them() -> None:
    chosen = node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    graph = helper.make_graph([chosen, node("Neg", ["y"], ["z"])], "g", [], [])
    assert [one.op_type for one in all_nodes(graph)] == ["If", "Relu", "Relu", "Neg"]
    assert {inner.name for inner in inner_graphs(chosen)} == {"a", "b"}
    assert list(inner_graphs(graph.node[1])) == []


def test_a_node_is_called_by_its_name_or_by_what_it_computes() -> None:
    assert label(node("Relu", ["x"], ["y"], name="relu_1")) == "relu_1"
    assert label(node("Split", ["x"], ["a", "b"])) == "Split -> a, b"
