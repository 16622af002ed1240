"""Outputs of a graph beside those of a reference: their number, and what the graph is fed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.errors import OptionError, VerificationError
from rewrite.onnx.export import export
from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    X,
    embedding,
    graph,
    saved,
)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"y": X[0]}, "inputs are x"),
        ((X[0], X[0]), "inputs are x"),
        ((X[0].long(),), "takes float32, not int64"),
        ((X[0][:, :2],), "is batchx3x6x6, not 2x2x6x6"),
        ((X[0][0],), "is batchx3x6x6"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_line(tmp_path, net, inputs, word):
    with pytest.raises(VerificationError, match=word) as error:
        verify_onnx(saved(tmp_path, graph(net)), net, inputs)
    assert "\n" not in str(error.value)


def test_integers_fed_as_floats_are_one_clear_line(tmp_path):
    path = saved(tmp_path, embedding())
    assert verify_onnx(path).ok
    with pytest.raises(VerificationError, match="takes int64, not float32; write --input 3:int64"):
        verify_onnx(path, None, (torch.ones(3),))


def test_another_number_of_outputs_is_one_clear_line(tmp_path, net):
    model = graph(net)
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 5]))
    with pytest.raises(VerificationError, match="returns 2 values"):
        verify_onnx(saved(tmp_path, model), net, X)


def test_an_approximate_graph_is_held_to_its_tolerance(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    path, x = tmp_path / "half.onnx", torch.randn(2, 8)
    assert export(net, path, example_inputs=(x,)).ok
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, path)
    assert not verify_onnx(path, net, (x,)).ok
    assert verify_onnx(path, net, (x,), contract="approximate", tolerance=1e-2).ok
    assert not verify_onnx(path, net, (x,), contract="approximate", tolerance=1e-6).ok
    assert verify_onnx(path, net, (x,), contract="approximate").max_rel > 1e-6
    with pytest.raises(OptionError, match="--contract approximate"):
        verify_onnx(path, net, (x,), tolerance=1e-2)
    with pytest.raises(OptionError, match="contract is 'approximatee'; pass exact, "):
        verify_onnx(path, net, (x,), contract="approximatee")
