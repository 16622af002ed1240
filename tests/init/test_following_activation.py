"""The activation that follows a layer."""

import math

import pytest
import torch
from torch import nn

from rewrite.init.gains import gain
from tests.passes.test_reinit import reinit


class Followed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1000)
        self.drop = nn.Dropout()
        self.layers = nn.ModuleList(nn.Linear(1000, 1000) for _ in range(6))
        self.slope = nn.LeakyReLU(0.3)

    def forward(self, x):
        x = self.drop(self.norm(self.layers[0](x))).relu()
        x = self.slope(self.layers[1](x))
        x = nn.functional.gelu(self.layers[2](x).reshape(-1, 1000))
        x = self.layers[3](x)
        y = torch.tanh(x + self.layers[4](x))
        return self.layers[5](y)


def test_gain_is_that_of_the_activation_that_follows():
    result = reinit(Followed())
    gains = ["relu", None, "gelu", "tanh", "tanh", "linear"]
    for layer, name in zip(result.model.layers, gains, strict=True):
        factor = gain("leaky_relu", 0.3) if name is None else gain(name)
        assert layer.weight.std().item() == pytest.approx(factor / math.sqrt(1000), rel=5e-3)
    said = [c.after for c in result.report.changes if c.target.startswith("layers")]
    assert "relu" in said[0]
    assert "leaky_relu" in said[1]
    assert "no activation" in said[5]


def test_an_activation_that_is_given_wins_over_the_graph():
    out = reinit(Followed(), activation="linear").model
    assert out.layers[0].weight.std().item() == pytest.approx(1 / math.sqrt(1000), rel=5e-3)
    out = reinit(Followed(), scheme="glorot:normal").model
    assert out.layers[0].weight.std().item() == pytest.approx(1 / math.sqrt(1000), rel=5e-3)
