"""Numbers that a forward makes anew at each call are no constants; those that it computes are."""

from __future__ import annotations

import random
import time
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.graph.capture import capture


class Scaled(nn.Module):
    """A convolution, times a constant per channel, times a number."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.scale * self.number()


DRAWS = {
    "random.random": lambda: random.random(),
    "numpy.random.rand": lambda: np.random.rand(),
    "numpy.random.default_rng": lambda: np.random.default_rng().random(),
    "time.time": lambda: time.time() % 1,
    "uuid.uuid4": lambda: uuid.uuid4().int % 7,
    "needs a random number of torch": lambda: torch.rand(()).item(),
    "random number of torch": lambda: 1.0 if torch.rand(()) < 0.5 else 2.0,
}


def folded(number: Any) -> Any:
    model = Scaled(number).double().eval()
    return rewrite.convert(model, "fold", example_inputs=torch.randn(2, 3, 5, 5).double())


@pytest.mark.parametrize("name", DRAWS)
def test_a_number_that_is_drawn_is_no_constant(name: str) -> None:
    model = Scaled(DRAWS[name]).double().eval()
    captured = capture(model, torch.randn(2, 3, 5, 5).double())
    assert name in captured.opaque[""].reason
    assert "test_draws.py" in str(captured.opaque[""].source)


def test_what_is_computed_is_one() -> None:
    result = folded(lambda: float(np.sqrt(64)) + np.float64(1) + torch.tensor(2.0).item())
    assert {change.target for change in result.report.changes} == {"bn", "scale"}


def test_the_functions_and_the_generators_are_what_they_were() -> None:
    held = (random.random, time.time, np.random.rand, torch.Tensor.item)
    random.seed(3)
    want = random.random()
    random.seed(3)
    capture(Scaled(DRAWS["random.random"]), torch.randn(2, 3, 5, 5))
    assert random.random() == want
    assert held == (random.random, time.time, np.random.rand, torch.Tensor.item)
