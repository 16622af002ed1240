"""A forward that asks torch for a mode, or a tensor for how it is held: both ways, or declined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import rewrite


class Block(nn.Module):
    """conv -> what the class says -> norm -> conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.asks(y):
            return self.head(y)
        return self.head(self.bn(y))

    def asks(self, y: Tensor) -> bool:
        return False


class InInference(Block):
    def asks(self, y: Tensor) -> bool:
        return torch.is_inference_mode_enabled()


class WithoutGradients(Block):
    def asks(self, y: Tensor) -> bool:
        return not torch.is_grad_enabled()


class UnderAutocast(Block):
    def asks(self, y: Tensor) -> bool:
        return torch.is_autocast_enabled("cpu")


class ANumber(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + (2.0 if torch.is_grad_enabled() else 0.0)
        return self.head(self.bn(y))


class OfTheTensor(Block):
    def asks(self, y: Tensor) -> bool:
        return y.requires_grad


class Leaf(Block):
    def asks(self, y: Tensor) -> bool:
        return y.is_leaf


class Strided(Block):
    def asks(self, y: Tensor) -> bool:
        return not y.is_contiguous()


class Functional(Block):
    """The line of the norm could only go together with the branch above it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if torch.is_grad_enabled():
            y = y * 2
        bn = self.bn
        assert bn.running_mean is not None and bn.running_var is not None
        return self.head(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias))


class Rebinds(Block):
    """Both ways go on with one code, and the norm is behind them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if torch.is_grad_enabled():
            y = y * 2
        return self.head(self.bn(y))


class Contiguous(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not y.is_contiguous():
            y = y.contiguous()
        return self.head(self.bn(y))


class Scripted(Block):
    def asks(self, y: Tensor) -> bool:
        return torch.jit.is_scripting() or torch.jit.is_tracing()


MODES: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
    torch.enable_grad, torch.no_grad, torch.inference_mode,
)  # fmt: skip


def fold(kind: type[Block]) -> Any:
    torch.manual_seed(0)
    model = models.randomize_norms_(kind()).double().eval()
    before = copy.deepcopy(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x)
    for mode in MODES:
        with mode():
            for given in (x, x.transpose(2, 3)):
                want, got = before(given), result.model(given)
                assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    return result


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InInference, "in inference mode, or out of it"),
        (WithoutGradients, "where gradients are computed, or are not"),
        (UnderAutocast, "under autocast, or without it"),
        (ANumber, "where gradients are computed, or are not"),
        (OfTheTensor, "test_modes.py"),
        (Leaf, "test_modes.py"),
        (Strided, "test_modes.py"),
        (Functional, "does something else where gradients are computed, or are not (test_modes.py"),
    ],
)
def test_what_depends_on_a_mode_is_declined_with_the_line(kind: type[Block], reason: str) -> None:
    result = fold(kind)
    assert not result.report.changes
    assert any(reason in skip.reason for skip in result.report.skips), result.report.skips
    assert any("test_modes.py:" in skip.reason for skip in result.report.skips)


@pytest.mark.parametrize("kind", [Block, Rebinds, Contiguous, Scripted])
def test_what_both_ways_share_is_folded(kind: type[Block]) -> None:
    assert [change.target for change in fold(kind).report.changes] == ["bn"]


def test_the_functions_of_torch_are_what_they_were() -> None:
    held = (torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled)
    fold(InInference)
    now = (torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled)
    assert now == held


class AskedInAHelper(Block):
    """The helper decides, and answers; its caller does something else."""

    def asks(self, y: Tensor) -> bool:
        if y.shape[-1] > 40:
            y.neg()
            return True
        return False


class AskedOfASize(Block):
    def asks(self, y: Tensor) -> bool:
        return not y.shape[-1] < 40


class HelpedByATensor(Block):
    """A helper that returns a tensor answers nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.cropped(self.conv(x))))

    def cropped(self, y: Tensor) -> Tensor:
        return y[:, :, : int(y.shape[2] * 0.8)]


@pytest.mark.parametrize("kind", [AskedInAHelper, AskedOfASize])
def test_a_helper_that_answers_makes_its_caller_decide(kind: type[Block]) -> None:
    (skip,) = fold(kind).report.skips
    assert "for an input of another size" in skip.reason


def test_a_helper_that_returns_a_tensor_decides_alone() -> None:
    assert [change.target for change in fold(HelpedByATensor).report.changes] == ["bn"]
