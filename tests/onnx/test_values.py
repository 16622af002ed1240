"""Values on the way of a graph: what depends on the input, with the module that each came from."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewrite.onnx.file import open_onnx
from rewrite.onnx.values import scope_of, values_of


def graph() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Add", ["c", "c"], ["constant"]),
        helper.make_node("Mul", ["x", "constant"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["y"]),
    ]
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array([1, -1], dtype=np.float32), "c")],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_any_value_can_be_fetched_and_the_graph_stays(tmp_path) -> None:
    onnx.save(graph(), tmp_path / "a.onnx")
    opened = open_onnx(tmp_path / "a.onnx")
    before = opened.model.SerializeToString()
    feed = {"x": np.array([3, 4], dtype=np.float32)}
    found = dict(values_of(opened, feed, ["scaled", "constant", "y"]))
    assert {name: value.tolist() for name, value in found.items()} == {
        "scaled": [6, -8], "constant": [2, -2], "y": [6, 0],
    }  # fmt: skip
    assert opened.model.SerializeToString() == before


@pytest.mark.parametrize(
    ("scopes", "name"),
    [
        ("['', 'layer1', 'layer1.conv', 'conv2d']", "layer1.conv"),
        ('["", "relu"]', ""), ("['add']", ""), ("", None), (None, None),
    ],
)  # fmt: skip
def test_the_module_is_the_scope_before_the_operation(scopes: str | None, name: str | None) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    if scopes is not None:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert scope_of(node) == name
