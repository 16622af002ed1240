"""What an ONNX graph shows before it runs."""

from __future__ import annotations

import numpy as np
from onnx import helper, numpy_helper

from rewrite.equivalence.verification import Level
from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    graph,
    node,
    saved,
)


def test_the_census_is_checked(tmp_path, net):
    path = saved(tmp_path, graph(net))
    found = verify_onnx(path, expect={"Conv": 2}, expect_no=["BatchNormalization"])
    assert found.ok
    assert found.operator_counts["Conv"] == 2
    assert not verify_onnx(path, expect={"Conv": 3}, level=Level.QUICK).ok
    assert not verify_onnx(path, expect_no=["Relu"], level=Level.QUICK).ok


def test_training_nodes_and_duplicates_are_found(tmp_path, net):
    model = graph(net)
    model.graph.node.insert(1, helper.make_node("Dropout", ["c1", "ratio", "on"], ["t"], "drop"))
    node(model, "relu").input[0] = "t"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
    big = np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)
    for name in ("one", "two"):
        model.graph.initializer.append(numpy_helper.from_array(big, name))
    found = verify_onnx(saved(tmp_path, model), level=Level.QUICK)
    assert any("training mode" in reason for reason in found.reasons)
    assert any("one and two" in reason for reason in found.reasons)


def test_a_graph_that_draws_random_numbers_is_found(tmp_path, net):
    model = graph(net)
    model.graph.node.insert(1, helper.make_node("RandomNormalLike", ["c1"], ["r"], "random"))
    node(model, "relu").input[0] = "r"
    found = verify_onnx(saved(tmp_path, model), level=Level.QUICK)
    assert any("two runs differ" in reason for reason in found.reasons)
