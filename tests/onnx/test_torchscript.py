"""PyTorch's older exporter, where the newer one fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from rewrite.errors import ExportError
from rewrite.onnx.export import export
from rewrite.onnx.feeds import dynamic_axes
from rewrite.onnx.file import open_onnx
from rewrite.onnx.values import scope_of
from rewrite.onnx.verify import verify_onnx
from tests.onnx.test_export import X
from tests.onnx.test_exporters import Loop


def test_a_trace_holds_for_its_own_input_and_other_inputs_tell(tmp_path):
    path, x = tmp_path / "loop.onnx", torch.rand(2, 2)
    wrong = export(Loop(), path, example_inputs=(x,), exporter="torchscript")
    assert any("batch 7: output[0] is off by" in reason for reason in wrong.reasons), str(wrong)
    found = export(Loop(), path, example_inputs=(x,), exporter="torchscript", dynamic_batch=False)
    assert found.ok, str(found)
    assert "branches are those of the given input" in found.notes[0]
    more = verify_onnx(path, Loop(), (x,))
    assert not more.ok
    assert any("output[0] is off by" in reason for reason in more.reasons), str(more)


def test_a_trace_keeps_names_and_dynamic_axes(tmp_path):
    path, model = tmp_path / "net.onnx", resnet18(num_classes=5).eval()
    axes = {"x": {2: "height", 3: "width"}}
    x = torch.randn(2, 3, 32, 32)
    found = export(
        model, path, example_inputs=(x,), dynamic_shapes=axes, exporter="torchscript", opset=18
    )
    assert found.ok, str(found)
    opened = open_onnx(path)
    assert opened.opset == 18
    assert dynamic_axes(opened) == {"x": {0: "batch", 2: "height", 3: "width"}}
    owners = {scope_of(node) for node in opened.model.graph.node if node.op_type == "Conv"}
    assert owners == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def test_a_trace_of_an_opset_that_its_exporter_does_not_write_is_refused(tmp_path, small):
    with pytest.raises(ExportError, match="--opset 21: the exporter torchscript ends at 20"):
        export(small, tmp_path / "x.onnx", example_inputs=(X,), exporter="torchscript", opset=21)
