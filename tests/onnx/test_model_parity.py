"""An ONNX graph beside a PyTorch model: other sizes, and the module at which they part."""

from __future__ import annotations

import json

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from rewrite.equivalence.verification import Level
from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    X,
    add_to,
    graph,
    saved,
)


def test_the_divergence_names_the_module(tmp_path, net):
    model = graph(net)
    add_to(model, "middle_weight", 1e-3)
    found = verify_onnx(saved(tmp_path, model), net, X)
    assert found.divergence.target == "middle"
    assert found.divergence.error_in < 1e-6 < 1e-4 < found.divergence.error_out
    assert "conv2" in str(found)
    assert json.loads(found.to_json())["divergence"]["node"] == "conv2"
    assert list(found.tables())


def test_a_batch_that_is_baked_in_is_found(tmp_path):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], "reshape")]
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "baked",
        [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(np.array([2, 2]), "shape")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    found = verify_onnx(saved(tmp_path, model), level=Level.QUICK)
    assert not found.ok
    assert any("batch 2" in reason for reason in found.reasons)
