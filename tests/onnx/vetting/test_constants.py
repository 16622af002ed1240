"""Constants that decide sizes, computed as far as they are small."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rewrite.onnx.vetting.constants import with_sizes

node = helper.make_node


def graph(nodes, *constants, opset=18) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    body = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])


def given(name: str, content: object, kind: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(content, kind), name)


def known(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {
        tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer
    }


def test_a_size_is_computed_over_several_steps() -> None:
    model = graph(
        [
            node("Constant", [], ["two"], value=given("", [2])),
            node("Pow", ["two", "n"], ["p"]),
            node("Sub", ["p", "two"], ["q"]),
            node("Expand", ["x", "q"], ["y"]),
        ],
        given("n", [10]),
    )
    assert known(with_sizes(model)) == {"n": [10], "two": [2], "p": [1024], "q": [1022]}
    assert known(model) == {"n": [10]}, "the graph that was given stays"


def test_an_older_operator_set_keeps_its_spelling() -> None:
    nodes = [
        node("Unsqueeze", ["n"], ["s"], axes=[0]), node("Expand", ["x", "s"], ["y"])
    ]  # fmt: skip
    assert known(with_sizes(graph(nodes, given("n", 7), opset=11)))["s"] == [7]


def test_a_graph_without_computed_sizes_is_left_as_it_is() -> None:
    model = graph([node("Expand", ["x", "n"], ["y"])], given("n", [10]))
    assert with_sizes(model) is model


def test_what_is_large_or_depends_on_an_input_is_not_computed() -> None:
    large = graph(
        [node("ReduceSum", ["n"], ["s"], keepdims=1), node("Expand", ["x", "s"], ["y"])],
        given("n", np.ones(1000)),
    )
    assert "s" not in known(with_sizes(large))
    depends = graph(
        [node("Shape", ["x"], ["s"]), node("Mul", ["s", "n"], ["m"]),
         node("Expand", ["x", "m"], ["y"])],
        given("n", [10]),
    )  # fmt: skip
    assert known(with_sizes(depends)) == {"n": [10]}


def test_what_the_reference_refuses_is_left_to_the_checker() -> None:
    model = graph(
        [node("Mul", ["n", "m"], ["s"]), node("Expand", ["x", "s"], ["y"])],
        given("n", [1, 2, 3]), given("m", [1, 2]),
    )  # fmt: skip
    assert set(known(with_sizes(model))) == {"n", "m"}
