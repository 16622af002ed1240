"""The model behind the graph that is written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.randomize import randomize_norms_
from tests.onnx.graphs import Exported, Net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Return the PyTorch side of `graph()`, with a norm that does something."""
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model


@pytest.fixture
def small() -> nn.Module:
    """Return a model for an exporter: randomized, in eval mode."""
    return randomize_norms_(Exported()).eval()
