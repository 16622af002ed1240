"""Counterparts: a value is held to what its own operator should make; ties are no differences."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.equivalence.verification import Level
from rewrite.onnx.counterparts import alike
from rewrite.onnx.export import export
from rewrite.onnx.verify import verify_onnx

make = helper.make_node


def saved(tmp_path, nodes, inputs, outputs, stored=()):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, k, s) for n, (k, s) in outputs.items()],
        list(stored),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def test_operators_and_their_names():
    assert alike("Add", "__iadd__")
    assert alike("Conv", "conv2d")
    assert alike("Relu", "relu_")
    assert not alike("ReduceMean", "var")
    assert not alike("Sub", "add")


class Variance(nn.Module):
    """x / sqrt(var x): the graph takes a mean on the way that PyTorch never has."""

    def forward(self, x):
        return (x / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()).tanh()


def test_the_mean_inside_of_a_variance_is_no_variance(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 12, 12) * torch.rand(8, 1, 1) + torch.randn(8, 1, 1)
    found = export(Variance(), tmp_path / "v.onnx", example_inputs=(x,))
    assert found.ok, str(found)


class Hidden(nn.Module):
    """A channel that a ReLU holds at zero, before an output that does not show it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def test_a_counterpart_is_wrong_though_no_output_shows_it(tmp_path):
    torch.manual_seed(0)
    net = Hidden().eval()
    net.first.bias.data[2] = -50.0
    path, x = tmp_path / "h.onnx", torch.rand(4, 6)
    assert export(net, path, example_inputs=(x,)).ok
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("first.weight"))
    value = numpy_helper.to_array(tensor).copy()
    value[2] *= 1.5
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, path)
    found = verify_onnx(path, net, (x,), level=Level.QUICK)
    assert found.max_rel < 1e-6
    assert not found.ok
    assert found.divergence.target == "first"


def test_a_value_without_a_counterpart_is_a_note(tmp_path):
    """max(x - 1e3, 0) + 3 x by another way: the output agrees, the operator is nobody's."""

    class Tripled(nn.Module):
        def forward(self, x):
            return torch.relu(x - 1000.0) + 3 * x

    stored = [
        numpy_helper.from_array(np.array(v, np.float32), n)
        for n, v in (("far", -1000.5), ("three", 3.0))
    ]
    nodes = [
        make("Sum", ["x", "far"], ["shifted"], "shift"),
        make("Relu", ["shifted"], ["zero"], "clamp"),
        make("Mul", ["x", "three"], ["tripled"], "triple"),
        make("Add", ["zero", "tripled"], ["y"], "add"),
    ]
    path = saved(tmp_path, nodes, {"x": [3, 4]}, {"y": (TensorProto.FLOAT, [3, 4])}, stored)
    found = verify_onnx(path, Tripled(), (torch.randn(3, 4),), level=Level.QUICK)
    assert found.ok, str(found)
    assert any("node shift (Sum) has no counterpart" in note for note in found.notes)


class Chosen(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def forward(self, x):
        return self.choose(x)


def test_indices_of_equal_values_are_ties(tmp_path):
    # onnxruntime takes the first of equal values; this model takes the last.
    last = Chosen(lambda x: x.shape[-1] - 1 - x.flip(-1).argmax(-1))
    nodes = [make("ArgMax", ["x"], ["y"], axis=-1, keepdims=0)]
    path = saved(tmp_path, nodes, {"x": [2, 5]}, {"y": (TensorProto.INT64, [2])})
    x = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0], [4.0, 1.0, 0.0, 4.0, 4.0]])
    found = verify_onnx(path, last, (x,), level=Level.QUICK)
    assert found.ok, str(found)
    assert any("2 indices differ: ties of equal values" in note for note in found.notes)
    wrong = verify_onnx(path, Chosen(lambda x: x.argmin(-1)), (x,), level=Level.QUICK)
    assert not wrong.ok
    assert any("int64 values differ" in reason for reason in wrong.reasons)


def test_infinity_is_right_where_the_model_has_it(tmp_path):
    masked = Chosen(lambda x: x.masked_fill(x > 0, float("-inf")))
    x = torch.randn(3, 4)
    found = export(masked, tmp_path / "m.onnx", example_inputs=(x,))
    assert found.ok, str(found)
    other = Chosen(lambda x: x.masked_fill(x > 0.1, float("-inf")))
    x[0, 0] = 0.05
    assert not verify_onnx(tmp_path / "m.onnx", other, (x,), level=Level.QUICK).ok
    alone = verify_onnx(tmp_path / "m.onnx", example_inputs=(x,), level=Level.QUICK)
    assert any("NaN or infinity" in reason for reason in alone.reasons)


def test_what_overflows_in_the_models_own_type_is_right(tmp_path):
    squared = Chosen(lambda x: (x * 1e30) ** 2)
    assert export(squared, tmp_path / "o.onnx", example_inputs=(torch.ones(2, 3),)).ok


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(15, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids):
        return self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0).mean(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_paths_of_pytorch_that_disagree_are_the_finding(tmp_path):
    torch.manual_seed(0)
    model = Encoder().eval()
    ids = torch.randint(1, 15, (3, 7))
    ids[0, 5:] = ids[1, 3:] = 0
    found = export(model, tmp_path / "e.onnx", example_inputs=(ids,))
    assert not found.ok
    assert "PyTorch disagrees with itself in encoder (TransformerEncoder)" in str(found)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert verify_onnx(tmp_path / "e.onnx", model, (ids,), level=Level.QUICK).ok
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    unpadded = torch.randint(1, 15, (3, 7))
    assert export(model, tmp_path / "e.onnx", example_inputs=(unpadded,)).ok
