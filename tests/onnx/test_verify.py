"""Verification of ONNX files: right ones pass, each wrong one is caught at the right node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.equivalence.verification import Level
from rewrite.errors import OptionError, VerificationError
from rewrite.onnx.verify import verify_onnx


class Net(nn.Module):
    """The PyTorch side of `graph()`: three layers, a residual, a difference, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm([6, 6])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = self.norm(self.middle(a))
        return self.head((a - b).mean((2, 3))).softmax(-1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model


def graph(net: nn.Module) -> onnx.ModelProto:
    """Write `net` by hand, so that no exporter stands between a fault and its finding."""
    weights = {
        name.replace(".", "_"): tensor.detach().numpy() for name, tensor in net.named_parameters()
    }
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "first_weight", "first_bias"], ["c1"], "conv1", **conv),
        make("Relu", ["c1"], ["a"], "relu"),
        make("Conv", ["a", "middle_weight", "middle_bias"], ["c2"], "conv2", **conv),
        make("LayerNormalization", ["c2", "norm_weight", "norm_bias"], ["b"], "norm", axis=-2),
        make("Sub", ["a", "b"], ["d"], "sub"),
        make("ReduceMean", ["d", "axes"], ["m"], "mean", keepdims=0),
        make("Gemm", ["m", "head_weight", "head_bias"], ["h"], "head", transB=1),
        make("Softmax", ["h"], ["y"], "softmax", axis=-1),
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    stored.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "net",
        [value("x", TensorProto.FLOAT, ["batch", 3, 6, 6])],
        [value("y", TensorProto.FLOAT, ["batch", 5])],
        stored,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


X = (torch.linspace(-2, 2, 2 * 3 * 36).reshape(2, 3, 6, 6),)


def saved(tmp_path: Path, model: onnx.ModelProto, name: str = "net.onnx") -> Path:
    path = tmp_path / name
    onnx.save(model, path)
    return path


def node(model: onnx.ModelProto, name: str):
    return next(n for n in model.graph.node if n.name == name)


def weight(model: onnx.ModelProto, name: str):
    return next(t for t in model.graph.initializer if t.name == name)


def add_to(model: onnx.ModelProto, name: str, amount: float, index: int | None = None) -> None:
    tensor = weight(model, name)
    value = numpy_helper.to_array(tensor).copy()
    if index is None:
        value += np.float32(amount)
    else:
        value.reshape(-1)[index] += amount
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def set_attribute(model: onnx.ModelProto, name: str, **values) -> None:
    target = node(model, name)
    for key, value in values.items():
        kept = [a for a in target.attribute if a.name != key]
        del target.attribute[:]
        target.attribute.extend([*kept, helper.make_attribute(key, value)])


def swap_inputs(model: onnx.ModelProto, name: str) -> None:
    target = node(model, name)
    target.input[0], target.input[1] = target.input[1], target.input[0]


def skip_relu(model: onnx.ModelProto) -> None:
    for other in model.graph.node:
        if other.name != "relu":
            other.input[:] = ["c1" if name == "a" else name for name in other.input]
    model.graph.node.remove(node(model, "relu"))


def swap_channels(model: onnx.ModelProto) -> None:
    tensor = weight(model, "middle_weight")
    value = numpy_helper.to_array(tensor).copy()
    value[[0, 1]] = value[[1, 0]]
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


WRONG = {
    "initializer": (lambda m: add_to(m, "middle_weight", 1e-3), "conv2"),
    "one element": (lambda m: add_to(m, "middle_weight", 1e-3, 100), "conv2"),
    "bias": (lambda m: add_to(m, "head_bias", 1e-3, 1), "head"),
    "epsilon": (lambda m: set_attribute(m, "norm", epsilon=1e-2), "norm"),
    "pads": (lambda m: set_attribute(m, "conv2", pads=[2, 1, 0, 1]), "conv2"),
    "axis": (lambda m: set_attribute(m, "softmax", axis=0), "softmax"),
    "alpha": (lambda m: set_attribute(m, "head", alpha=1.001), "head"),
    "inputs": (lambda m: swap_inputs(m, "sub"), "sub"),
    "channels": (swap_channels, "conv2"),
    "activation": (skip_relu, "conv2"),
}


def test_a_right_graph_is_verified(tmp_path, net):
    path = saved(tmp_path, graph(net))
    for model in (None, net, path):
        found = verify_onnx(path, model, X)
        assert found.ok, str(found)
        assert found.divergence is None
    assert verify_onnx(path, net, X).agreement == 1
    assert verify_onnx(path, net, {"x": X[0]}, level=Level.QUICK).ok
    assert verify_onnx(path, net).ok


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_graph_is_caught_and_located(tmp_path, net, fault):
    model = graph(net)
    spoil, where = WRONG[fault]
    spoil(model)
    path = saved(tmp_path, model)
    for reference in (net, saved(tmp_path, graph(net), "right.onnx")):
        found = verify_onnx(path, reference, X, level=Level.QUICK)
        assert not found.ok
        assert found.divergence is not None
        assert found.divergence.node == where, str(found)


def test_the_divergence_names_the_module(tmp_path, net):
    model = graph(net)
    add_to(model, "middle_weight", 1e-3)
    found = verify_onnx(saved(tmp_path, model), net, X)
    assert found.divergence.target == "middle"
    assert found.divergence.error_in < 1e-6 < 1e-4 < found.divergence.error_out
    assert "conv2" in str(found)
    assert json.loads(found.to_json())["divergence"]["node"] == "conv2"
    assert list(found.tables())


def test_a_repro_of_the_diverging_node_runs_by_itself(tmp_path, net):
    model = graph(net)
    set_attribute(model, "norm", epsilon=1e-2)
    folder = tmp_path / "repro"
    verify_onnx(saved(tmp_path, model), net, X, repro=folder)
    alone = onnx.load(folder / "node.onnx")
    assert [n.name for n in alone.graph.node] == ["norm"]
    run = subprocess.run(
        [sys.executable, "repro.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "differs by" in run.stdout
    assert len((folder / "repro.py").read_text().splitlines()) <= 12


def test_the_census_is_checked(tmp_path, net):
    path = saved(tmp_path, graph(net))
    found = verify_onnx(path, expect={"Conv": 2}, expect_no=["BatchNormalization"])
    assert found.ok
    assert found.operator_counts["Conv"] == 2
    assert not verify_onnx(path, expect={"Conv": 3}, level=Level.QUICK).ok
    assert not verify_onnx(path, expect_no=["Relu"], level=Level.QUICK).ok


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


# -- bad input: one clear line each ------------------------------------------------------------


def external(tmp_path: Path, net: nn.Module) -> Path:
    path = tmp_path / "big.onnx"
    onnx.save(graph(net), path, save_as_external_data=True, location="big.data", size_threshold=64)
    return path


def rename_external(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = location
    path.write_bytes(model.SerializeToString())


def test_external_data_is_read(tmp_path, net):
    assert verify_onnx(external(tmp_path, net), net, X, level=Level.QUICK).ok


def truncated(tmp_path, net):
    path = saved(tmp_path, graph(net))
    path.write_bytes(path.read_bytes()[:1000])
    return path


def random_bytes(tmp_path, net):
    path = tmp_path / "random.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(3000))
    return path


def empty(tmp_path, net):
    path = tmp_path / "empty.onnx"
    path.touch()
    return path


def missing(tmp_path, net):
    return tmp_path / "missing.onnx"


def unknown_operator(tmp_path, net):
    model = graph(net)
    node(model, "relu").op_type = "Frobnicate"
    return saved(tmp_path, model)


def data_missing(tmp_path, net):
    path = external(tmp_path, net)
    (tmp_path / "big.data").unlink()
    return path


def data_short(tmp_path, net):
    path = external(tmp_path, net)
    data = tmp_path / "big.data"
    data.write_bytes(data.read_bytes()[:100])
    return path


def data_outside(tmp_path, net):
    (tmp_path / "inner").mkdir()
    path = external(tmp_path / "inner", net)
    (tmp_path / "inner" / "big.data").rename(tmp_path / "big.data")
    rename_external(path, "../big.data")
    return path


def data_linked_outside(tmp_path, net):
    (tmp_path / "inner").mkdir()
    path = external(tmp_path / "inner", net)
    (tmp_path / "inner" / "big.data").rename(tmp_path / "big.data")
    (tmp_path / "inner" / "big.data").symlink_to(tmp_path / "big.data")
    return path


def nan_weight(tmp_path, net):
    model = graph(net)
    add_to(model, "first_weight", float("nan"), 3)
    return saved(tmp_path, model)


def short_weight(tmp_path, net):
    model = graph(net)
    tensor = weight(model, "first_weight")
    tensor.raw_data = tensor.raw_data[:-4]
    return saved(tmp_path, model)


BAD = {
    truncated: "truncated",
    random_bytes: "not an ONNX file",
    empty: "not an ONNX file",
    missing: "no such file",
    unknown_operator: "Frobnicate",
    data_missing: "is missing",
    data_short: "too short",
    data_outside: "outside",
    data_linked_outside: "outside",
    nan_weight: "first_weight: 1 of 216 values are NaN",
    short_weight: "first_weight",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_file_is_one_clear_line(tmp_path, net, make):
    path = make(tmp_path, net)
    with pytest.raises(VerificationError, match=BAD[make]) as error:
        verify_onnx(path, net, X)
    assert "\n" not in str(error.value)


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


def embedding() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"], "gather")],
        "embedding",
        [value("ids", TensorProto.INT64, ["n"])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.ones((5, 2), np.float32), "table")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def test_integers_fed_as_floats_are_one_clear_line(tmp_path):
    path = saved(tmp_path, embedding())
    assert verify_onnx(path).ok
    with pytest.raises(VerificationError, match="takes int64, not float32; write --input 3:int64"):
        verify_onnx(path, None, (torch.ones(3),))


def test_a_level_may_be_a_text_and_an_unknown_one_is_refused(tmp_path, net):
    path = saved(tmp_path, graph(net))
    for level in ("thorough", Level.THOROUGH, "quick", Level.QUICK):
        names = [check.name for check in verify_onnx(path, net, X, level=level).checks]
        assert ("optimization levels" in names) == (level == "thorough")
    with pytest.raises(OptionError, match="level is 'nonsense'; pass quick, thorough"):
        verify_onnx(path, net, X, level="nonsense")


def test_another_number_of_outputs_is_one_clear_line(tmp_path, net):
    model = graph(net)
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 5]))
    with pytest.raises(VerificationError, match="returns 2 values"):
        verify_onnx(saved(tmp_path, model), net, X)
