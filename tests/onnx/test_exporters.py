"""Calls of PyTorch's exporters: names, dynamic axes, opsets, and one-line errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.errors import ExportError
from rewrite.onnx.export import export
from rewrite.onnx.feeds import dynamic_axes
from rewrite.onnx.file import open_onnx
from rewrite.onnx.verify import verify_onnx
from tests.onnx.test_export import A, B, X


def test_more_axes_are_dynamic_on_request(tmp_path, small):
    found = export(
        small,
        tmp_path / "net.onnx",
        example_inputs=(X,),
        dynamic_shapes={"image": {2: "height", 3: "width"}},
    )
    assert found.ok, str(found)
    bigger = torch.ones(5, 3, 11, 13)
    assert verify_onnx(tmp_path / "net.onnx", small, (bigger,)).ok


def test_keyword_inputs_keep_their_names(tmp_path, small):
    inputs = {"image": torch.cat([X, X]), "scale": torch.ones(2, 1, 1, 1)}
    found = export(small, tmp_path / "net.onnx", example_inputs=inputs)
    assert found.ok, str(found)
    assert {value.name for value in open_onnx(tmp_path / "net.onnx").inputs} == {"image", "scale"}


class Loop(nn.Module):
    def forward(self, x):
        for _ in range(8):
            if x.abs().sum() < 100:
                x = x * 2
        return x


def test_what_the_exporter_refuses_is_one_line_and_leaves_no_file(tmp_path):
    with pytest.raises(ExportError, match=r"Loop: torch\.onnx\.export fails") as error:
        export(Loop(), tmp_path / "loop.onnx", example_inputs=(torch.ones(2, 2),))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("--exporter torchscript may trace it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [-1, 3, 99])
def test_an_opset_that_the_exporter_does_not_write_is_refused(tmp_path, small, opset):
    with pytest.raises(ExportError, match=f"--opset {opset}: "):
        export(small, tmp_path / "x.onnx", example_inputs=(X,), opset=opset)
    assert not list(tmp_path.iterdir())


class States(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x, h, c):
        return self.lstm(x, (h, c))[0]


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, *xs):
        return self.linear(xs[0]) + xs[1]


class InDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, batch):
        return self.linear(batch["a"]) + batch["b"]


STATES = (torch.randn(2, 4, 5), torch.randn(1, 2, 6), torch.randn(1, 2, 6))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (States(), STATES),
        (Many(), (A, B)),
        (InDict(), ({"a": A, "b": B},)),
        (InDict(), {"batch": {"a": A, "b": B}}),
    ],
    ids=["states", "variadic", "a dict by position", "a dict by name"],
)
def test_every_form_of_inputs_has_a_dynamic_batch(tmp_path, model, inputs):
    found = export(model.eval(), tmp_path / "x.onnx", example_inputs=inputs)
    assert found.ok, str(found)
    assert "batch 7" in str(found)
    assert not found.notes


def test_the_batch_of_states_may_be_named(tmp_path):
    axes = {"x": {0: "batch"}, "h": {1: "batch"}, "c": {1: "batch"}}
    path = tmp_path / "x.onnx"
    found = export(States().eval(), path, example_inputs=STATES, dynamic_shapes=axes)
    assert found.ok, str(found)
    assert dynamic_axes(open_onnx(path)) == axes


class OneSize(nn.Module):
    def forward(self, x, y):
        return x.reshape(2, 6) @ y.reshape(6, 5)


def test_a_batch_that_stays_fixed_is_said(tmp_path):
    inputs = (torch.randn(3, 4), torch.randn(5, 6))
    found = export(OneSize(), tmp_path / "x.onnx", example_inputs=inputs)
    assert found.ok, str(found)
    assert any(note.startswith("the batch is fixed") for note in found.notes)
