"""Feeds: a symbol is one number, free axes are compared at other sizes, sizes are known before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.errors import VerificationError
from rewrite.onnx.export import export
from rewrite.onnx.feeds import dynamic_axes, feed_of, free_sizes, resized
from rewrite.onnx.file import open_onnx
from rewrite.onnx.verify import verify_onnx
from rewrite.runtime.inputs import Inputs

make = helper.make_node


def saved(tmp_path, nodes, inputs, outputs, stored=(), kinds=None, opset=17):
    value = helper.make_tensor_value_info
    kinds = kinds or {}
    graph = helper.make_graph(
        nodes,
        "graph",
        [value(n, kinds.get(n, TensorProto.FLOAT), shape) for n, shape in inputs.items()],
        [value(n, kinds.get(n, TensorProto.FLOAT), shape) for n, shape in outputs.items()],
        list(stored),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


@pytest.mark.parametrize("inputs", [None, (torch.randn(2, 3),)])
def test_a_negative_size_is_free(tmp_path, inputs):
    path = saved(tmp_path, [make("Relu", ["x"], ["y"])], {"x": [-1, 3]}, {"y": [-1, 3]})
    assert dynamic_axes(open_onnx(path)) == {"x": {0: "?"}}
    found = verify_onnx(path, example_inputs=inputs)
    assert found.ok, str(found)
    assert "batch 7" in str(found)


def test_one_symbol_on_two_inputs_is_one_number(tmp_path):
    nodes = [make("Transpose", ["h"], ["t"], perm=[1, 0, 2]), make("Add", ["x", "t"], ["y"])]
    shapes = {"x": ["batch", "time", 5], "h": ["time", "batch", 5]}
    path = saved(tmp_path, nodes, shapes, {"y": ["batch", "time", 5]})
    opened = open_onnx(path)
    given = Inputs((torch.randn(2, 4, 5), torch.randn(4, 2, 5)))
    assert free_sizes(opened, given) == {
        "batch": [(0, 0), (1, 1)],
        "time": [(0, 1), (1, 0)],
    }
    for case in resized(opened, given):
        x, h = case.inputs.args
        assert x.shape[:2] == h.shape[:2][::-1]
    found = verify_onnx(path, example_inputs=given)
    assert found.ok, str(found)
    assert verify_onnx(path).ok


def test_other_sizes_keep_indices_and_masks_legal(tmp_path):
    nodes = [make("Gather", ["table", "ids"], ["rows"]), make("Mul", ["rows", "mask"], ["y"])]
    table = numpy_helper.from_array(np.random.default_rng(0).random((9, 1)).astype("f4"), "table")
    path = saved(
        tmp_path,
        [*nodes],
        {"ids": ["batch", "n"], "mask": ["batch", "n", 1]},
        {"y": ["batch", "n", 1]},
        [table],
        {"ids": TensorProto.INT64},
    )
    given = Inputs((torch.tensor([[8, 3, 5]]), torch.tensor([[[1.0], [1.0], [0.0]]])))
    for case in resized(open_onnx(path), given):
        ids, mask = case.inputs.args
        assert set(ids.unique().tolist()) <= {3, 5, 8}
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert verify_onnx(path, example_inputs=given).ok


class FrozenRoot(nn.Module):
    def forward(self, x):
        return x.flatten(2) @ x.flatten(2).transpose(1, 2) / float(x.shape[2]) ** 0.5


def test_a_size_that_a_trace_froze_is_found_in_the_default_export(tmp_path):
    x = torch.randn(1, 3, 32, 32)
    found = export(
        FrozenRoot(), tmp_path / "f.onnx", example_inputs=(x,), exporter="torchscript",
        dynamic_shapes={"x": {2: "height", 3: "width"}},
    )  # fmt: skip
    assert not found.ok
    assert any("height 48" in reason for reason in found.reasons), str(found)
    right = export(
        FrozenRoot(), tmp_path / "f.onnx", example_inputs=(x,),
        dynamic_shapes={"x": {2: "height", 3: "width"}},
    )  # fmt: skip
    assert right.ok, str(right)
    assert "height 48" in str(right)


def test_inputs_in_a_dict_are_fed_by_name_and_by_order(tmp_path):
    shapes = {"batch_a": [2], "batch_b": [2]}
    path = saved(tmp_path, [make("Sub", ["batch_a", "batch_b"], ["y"])], shapes, {"y": [2]})
    opened = open_onnx(path)
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    for inputs in (Inputs((), {"batch": {"a": a, "b": b}}), Inputs(({"a": a, "b": b},))):
        feed = feed_of(opened, inputs)
        assert feed["batch_a"].tolist() == [1.0, 2.0]
        assert feed["batch_b"].tolist() == [5.0, 7.0]
    swapped = feed_of(opened, Inputs((), {"batch": {"b": b, "a": a}}))
    assert swapped["batch_a"].tolist() == [1.0, 2.0]


def test_a_size_beyond_memory_is_known_before_anything_runs(tmp_path):
    sizes = numpy_helper.from_array(np.array([1 << 20, 1 << 20, 64]), "sizes")
    path = saved(
        tmp_path, [make("Expand", ["x", "sizes"], ["y"])], {"x": [1]}, {"y": [None] * 3}, [sizes]
    )
    with pytest.raises(VerificationError, match="would take") as error:
        verify_onnx(path)
    assert "\n" not in str(error.value)
    huge = saved(
        tmp_path, [make("Relu", ["x"], ["y"])], {"x": [1 << 20, 1 << 20]}, {"y": [None, None]}
    )
    with pytest.raises(VerificationError, match="would take"):
        verify_onnx(huge)
