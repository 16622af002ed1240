"""Declared dynamic axes are compared with the model at other sizes: batch, sides, sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.onnx.verify import verify_onnx

make = helper.make_node


class TimesRoot(nn.Module):
    """x * sqrt(size of one axis)."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return x * float(x.shape[self.axis]) ** 0.5


def root_of(axis: int, frozen: int | None) -> list[onnx.NodeProto]:
    """Return the nodes of `TimesRoot`; a trace that froze the size has a constant instead."""
    if frozen is not None:
        value = numpy_helper.from_array(np.array(frozen**0.5, np.float32))
        return [make("Constant", [], ["root"], value=value), make("Mul", ["x", "root"], ["y"])]
    return [
        make("Shape", ["x"], ["shape"]),
        make("Constant", [], ["axis"], value_int=axis),
        make("Gather", ["shape", "axis"], ["size"]),
        make("Cast", ["size"], ["number"], to=TensorProto.FLOAT),
        make("Sqrt", ["number"], ["root"]),
        make("Mul", ["x", "root"], ["y"]),
    ]


IMAGE = (["batch", 3, "height", "width"], (2, 3, 32, 48))
TEXT = (["batch", "sequence", 5], (2, 12, 5))
CASES = {
    "batch": (IMAGE, 0, ("batch 1", "batch 7")),
    "height": (IMAGE, 2, ("height 16", "height 48")),
    "width": (IMAGE, 3, ("width",)),
    "batch of text": (TEXT, 0, ("batch 1", "batch 7")),
    "sequence": (TEXT, 1, ("sequence",)),
}


def saved(folder: Path, shape, nodes) -> Path:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize("name", CASES)
def test_a_size_that_is_read_is_right_and_one_that_was_frozen_is_not(tmp_path, name) -> None:
    (shape, sizes), axis, labels = CASES[name]
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    model = TimesRoot(axis)
    right = verify_onnx(saved(tmp_path, shape, root_of(axis, None)), model, x)
    assert right.ok, str(right)
    assert all(label in str(right) for label in labels), str(right)
    frozen = verify_onnx(saved(tmp_path, shape, root_of(axis, sizes[axis])), model, x)
    assert not frozen.ok, str(frozen)
    if axis:  # other values of a batch of one already tell of a frozen batch
        assert any(labels[0] in reason for reason in frozen.reasons), frozen.reasons


def test_the_batches_are_one_two_and_seven(tmp_path) -> None:
    (shape, sizes), axis, _ = CASES["batch"]
    path = saved(tmp_path, shape, root_of(axis, None))
    for batch in (1, 2, 3, 7):
        x = torch.randn((batch, *sizes[1:]), generator=torch.Generator().manual_seed(0))
        text = str(verify_onnx(path, TimesRoot(axis), x))
        for other in {1, 2, 7} - {batch}:
            assert f"batch {other}" in text, (batch, text)


def test_a_frozen_size_is_right_where_the_axis_is_declared_fixed(tmp_path) -> None:
    """What the graph does not promise is not asked of it."""
    path = saved(tmp_path, ["batch", 3, 32, 48], root_of(2, 32))
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert verify_onnx(path, TimesRoot(2), x).ok
