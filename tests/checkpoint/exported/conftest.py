"""An exported program, and the model that it was made of."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint.exported.programs import Net


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return the file, and the model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "m.pt2"
    model = Net().eval()
    shapes = {"x": {0: torch.export.Dim("batch")}, "scale": None}
    inputs = (torch.randn(2, 3, 8, 8),)
    exported = torch.export.export(model, inputs, {"scale": 2.0}, dynamic_shapes=shapes)
    torch.export.save(exported, path)
    return path, model
