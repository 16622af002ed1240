"""A graph written by hand beside its PyTorch model, and the ways in which it can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn


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


class Exported(nn.Module):
    """A forward with an optional input and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, image, scale=None):
        x = self.drop(torch.relu(self.norm(self.conv(image))))
        return {"features": x if scale is None else x * scale, "pooled": x.mean((2, 3))}


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
