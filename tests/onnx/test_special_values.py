"""NaN and infinity: right where the model has them, and wrong everywhere else."""

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


class LogOfRelu(nn.Module):
    """-inf where the input is negative."""

    def forward(self, x):
        return torch.log(torch.relu(x))


class MaskedRows(nn.Module):
    """NaN in the rows that are masked whole, as attention over nothing is."""

    def forward(self, x):
        return torch.where(x > 0, x, float("-inf")).softmax(-1)


class Reciprocal(nn.Module):
    """Infinity of both signs, and numbers."""

    def forward(self, x):
        return 1 / torch.relu(x) - 1 / torch.relu(-x)


def scalar(name: str, value: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.float32), name)


LOG = [make("Relu", ["x"], ["r"]), make("Log", ["r"], ["y"])]
ROWS = [
    make("Greater", ["x", "zero"], ["m"]),
    make("Where", ["m", "x", "low"], ["w"]),
    make("Softmax", ["w"], ["y"], axis=-1),
]
RECIPROCAL = [
    make("Relu", ["x"], ["r"]), make("Neg", ["x"], ["n"]), make("Relu", ["n"], ["s"]),
    make("Reciprocal", ["r"], ["a"]), make("Reciprocal", ["s"], ["b"]),
    make("Sub", ["a", "b"], ["y"]),
]  # fmt: skip
LOW = scalar("low", -np.inf)

RIGHT = {
    "-inf": (LogOfRelu(), LOG, LOW),
    "NaN": (MaskedRows(), ROWS, LOW),
    "inf": (Reciprocal(), RECIPROCAL, LOW),
}
CLAMPED = [make("Max", ["r", "tiny"], ["c"]), make("Log", ["c"], ["y"])]
WRONG = {
    "-inf became -16": (LogOfRelu(), [LOG[0], *CLAMPED], LOW),
    "-inf became NaN": (
        LogOfRelu(), [make("Log", ["x"], ["y"])], LOW,
    ),
    "-inf became inf": (
        LogOfRelu(),
        [*LOG[:1], make("Log", ["r"], ["l"]), make("IsInf", ["l"], ["i"]),
         make("Abs", ["l"], ["p"]), make("Where", ["i", "p", "l"], ["y"])],
        LOW,
    ),
    "NaN became a number": (MaskedRows(), ROWS, scalar("low", -1e30)),
    "NaN became zero": (
        MaskedRows(),
        [*ROWS[:2], make("Softmax", ["w"], ["s"], axis=-1), make("IsNaN", ["s"], ["n"]),
         make("Where", ["n", "zero", "s"], ["y"])],
        LOW,
    ),
    "a number became NaN": (
        MaskedRows(),
        [make("Greater", ["x", "one"], ["m"]), *ROWS[1:]],
        LOW,
    ),
    "inf became its negative": (
        Reciprocal(), [*RECIPROCAL[:5], make("Sub", ["b", "a"], ["y"])], LOW,
    ),
}  # fmt: skip


def saved(folder: Path, nodes, low: onnx.TensorProto) -> Path:
    shape = ["batch", 6]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [low, scalar("zero", 0), scalar("one", 1.0), scalar("tiny", 1e-7)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "net.onnx")
    return folder / "net.onnx"


@pytest.fixture
def x() -> torch.Tensor:
    """Return rows of both signs, one of them all negative."""
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 0.3
    rows[2] = -rows[2].abs() - 0.1
    rows[0, 0] = 0.5  # between the two limits of a mask
    return rows


@pytest.mark.parametrize("name", RIGHT)
def test_what_the_model_has_is_right(tmp_path, x, name) -> None:
    model, nodes, low = RIGHT[name]
    assert not torch.isfinite(model(x)).all()
    found = verify_onnx(saved(tmp_path, nodes, low), model, x)
    assert found.ok, str(found)


@pytest.mark.parametrize("name", WRONG)
def test_what_it_does_not_have_is_wrong(tmp_path, x, name) -> None:
    model, nodes, low = WRONG[name]
    found = verify_onnx(saved(tmp_path, nodes, low), model, x)
    assert not found.ok, str(found)


@pytest.mark.parametrize("name", RIGHT)
def test_by_itself_a_graph_is_not_finite(tmp_path, x, name) -> None:
    """Without a model nobody says that NaN is right: it is named."""
    _, nodes, low = RIGHT[name]
    found = verify_onnx(saved(tmp_path, nodes, low), None, x)
    assert [check.name for check in found.checks if not check.ok] == ["finite"], str(found)
