"""Numbers that a forward makes anew at each call are no constants; those that it computes are."""

from __future__ import annotations

import random
import time
import uuid
from random import random as draw
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import rand
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
    "time.perf_counter": lambda: perf_counter() % 1,
    "random.random, by name": lambda: draw(),
    "numpy.random.rand, by name": lambda: rand(),
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
    assert name.removesuffix(", by name") in captured.opaque[""].reason
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


class Holding(Scaled):
    """A generator that the module holds."""

    def __init__(self, generator: Any) -> None:
        super().__init__(None)
        self.generator = generator
        self.kept = {"generator": generator}

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.scale * self.generator.random()


class InADict(Holding):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.scale * self.kept["generator"].random()


class HoldingOnly(Holding):
    """It draws while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.scale * 2.0


GENERATORS = {
    "random": lambda: random.Random(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy, old": lambda: np.random.RandomState(3),
}


@pytest.mark.parametrize("kind", [Holding, InADict])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_that_a_module_holds_makes_no_constants(name: str, kind: type[Holding]) -> None:
    model = kind(GENERATORS[name]()).double().eval()
    held, want = model.generator, GENERATORS[name]().random()
    captured = capture(model, torch.randn(2, 3, 5, 5).double())
    assert "generator.random, which gives another value" in captured.opaque[""].reason
    assert "test_draws.py" in str(captured.opaque[""].source)
    assert model.generator is model.kept["generator"] is held
    assert held.random() == want


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_that_no_call_uses_stops_nothing(name: str) -> None:
    model = HoldingOnly(GENERATORS[name]()).double().eval()
    result = rewrite.convert(model, "fold", example_inputs=torch.randn(2, 3, 5, 5).double())
    assert {change.target for change in result.report.changes} == {"bn", "scale"}


class OfTorch(Holding):
    """A number of a tensor that was drawn from a generator of torch."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.rand((), generator=self.generator).item()
        return self.bn(self.conv(x)) + self.scale * drawn


def test_a_number_of_a_generator_of_torch_is_no_constant() -> None:
    model = OfTorch(torch.Generator().manual_seed(3)).eval()
    state = model.generator.get_state()
    captured = capture(model)
    assert "needs a random number of torch" in captured.opaque[""].reason
    assert torch.equal(model.generator.get_state(), state)


class Counting(Scaled):
    """Its n-th call multiplies by n."""

    def __init__(self) -> None:
        super().__init__(None)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.bn(self.conv(x)) * self.calls + self.scale * self.calls


def test_a_number_that_counts_the_calls_is_no_constant() -> None:
    model = Counting().double().eval()
    x = torch.randn(2, 3, 5, 5).double()
    result = rewrite.convert(model, "fold", example_inputs=x)
    (skip,) = result.report.skips
    assert skip.target == "scale" and "assigns self.calls at test_draws.py" in skip.reason
    assert model.calls == result.model.calls
    for _ in range(3):
        assert torch.allclose(model(x), result.model(x), rtol=1e-12)
