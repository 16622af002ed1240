"""rewrite.verify on what float64 does not show: dtype, requires_grad, paths of inference_mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.equivalence.compare import compare
from rewrite.equivalence.deployed import path_reasons

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    """A linear layer; what a subclass does with its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


class NoGrad(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.linear(x)


class Autocast(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)


class FastPath(Net):
    """Takes another path where nothing is differentiated, as TransformerEncoder does."""

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return 2 * y if torch.is_inference_mode_enabled() else y


class GradientPath(Net):
    """Takes another path where something is differentiated."""

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return 2 * y if torch.is_grad_enabled() else y


class Tupled(Net):
    def forward(self, x: Tensor) -> Any:
        return {"y": (self.linear(x), [x])}


class Listed(Net):
    def forward(self, x: Tensor) -> Any:
        return {"y": [self.linear(x), [x]]}


class InnerTuple(Net):
    def forward(self, x: Tensor) -> Any:
        return {"y": (self.linear(x), (x,))}


class NeedsGradients(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            y = self.linear(x).sum()
            (gradient,) = torch.autograd.grad(y, self.linear.weight)
        return gradient


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (NoGrad(), "output: requires_grad became False"),
        (Autocast(), "output: float32 became bfloat16"),
        (FastPath(), "another path is taken"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("level", ["quick", "thorough"])
def test_what_float64_does_not_show(other, reason, level) -> None:
    found = rewrite.verify(Net(), other, X, level=level)
    assert any(reason in each for each in found.reasons), found
    assert rewrite.verify(Net(), Net(), X, level=level).ok
    assert rewrite.verify(other, other, X, level=level).ok


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Listed(), "output['y']: tuple became list"),
        (InnerTuple(), "output['y'][1]: list became tuple"),
        (Net(), "values are missing"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_structure_of_the_output_is_compared(other: nn.Module, reason: str) -> None:
    found = rewrite.verify(Tupled(), other, X, level="quick")
    assert any(reason in each for each in found.reasons), found
    assert rewrite.verify(other, other, X, level="quick").ok


def test_a_gradient_that_comes_is_a_difference_as_well() -> None:
    found = rewrite.verify(NoGrad(), Net(), X, level="quick")
    assert found.reasons == ("given: output: requires_grad became True",)


def test_a_path_that_gradients_take_is_a_difference_as_well() -> None:
    found = rewrite.verify(Net(), GradientPath(), X)
    assert not found.ok and any("with gradients" in reason for reason in found.reasons)
    assert rewrite.verify(GradientPath(), GradientPath(), X).ok


def test_a_model_whose_layers_are_frozen_may_lose_its_gradient() -> None:
    frozen = Net()
    frozen.requires_grad_(False)
    assert rewrite.verify(Net(), frozen, X, contract="exact-in-eval").ok


def test_a_forward_that_needs_gradients_is_run_as_it_can_be() -> None:
    assert rewrite.verify(NeedsGradients(), NeedsGradients(), X, level="quick").ok


@pytest.mark.parametrize(
    ("own", "size", "wrong"), [(1e-7, 0.5, True), (1e-7, 0.05, False), (0.02, 0.5, False)]
)
def test_a_path_is_another_one_where_no_rounding_explains_it(own, size, wrong) -> None:
    compared = compare(X, X * (1 + size))
    assert bool(path_reasons(compared, own)) is wrong
