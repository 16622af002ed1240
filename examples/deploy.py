"""Fold every norm of a trained network, export it to ONNX, and hold the file to the model."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import rewrite
from models.digits_resnet import CHECKPOINT

model = rewrite.load(CHECKPOINT).eval()
x = torch.randn(4, 1, 8, 8)
result = rewrite.convert(model, ["fold"], example_inputs=(x,))
print(result.report)

with TemporaryDirectory() as folder:
    file = Path(folder) / "digits.onnx"
    exported = rewrite.export(result.model, file, example_inputs=(x,))
    print(exported)
    # The file that will run is held to the model that was trained, not to the folded one.
    check = rewrite.verify_onnx(file, model, (x,))
    assert check.ok, check
    assert "BatchNormalization" not in check.operator_counts
