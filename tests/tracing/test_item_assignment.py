"""`x[key] = value` in a forward: a write, so that x is one value before it and another after."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from rewrite.graph.capture import capture


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)


class Before(Base):
    """The norm reads the value from before the write."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        y[:, 0] = 0
        return z + y


class Between(Base):
    """A view writes between convolution and norm: the norm cannot go into the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        part = y[:, 1:]
        part[:, 0] = 2
        return self.bn(y)


class Masked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[y < 0] = 0
        return self.bn(y)


class After(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y[:, 0] = 1
        return y


def _converted(kind: type[nn.Module]) -> tuple[int, float]:
    torch.manual_seed(0)
    model = models.randomize_norms_(kind()).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    result = rewrite.convert(model, ["fold"], example_inputs=(x,), verify=False)
    with torch.no_grad():
        error = float((result.model(x) - model(x)).abs().max())
    return len(result.report.passes[0].changes), error


@pytest.mark.parametrize("kind", [Before, Between, Masked])
def test_a_norm_beside_a_write_stays(kind: type[nn.Module]) -> None:
    changes, error = _converted(kind)
    assert changes == 0 and error == 0


def test_a_norm_before_the_write_folds() -> None:
    """The positive twin."""
    changes, error = _converted(After)
    assert changes == 1 and error < 1e-13


def test_it_is_one_call_that_stays_in_the_code() -> None:
    captured = capture(Before())
    assert [n.target for n in captured.nodes() if n.target is operator.setitem]
    assert not captured.opaque
