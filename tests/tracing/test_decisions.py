"""Branches on sizes: followed for the example's, and never trusted for another size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewrite
from models.randomize import randomize_norms_
from rewrite.graph.capture import capture

EVEN, ODD = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 5, 5)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.early, self.early_bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)


class PadsWhatTheNormMade(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return self.a(x)


class TakesAnotherLayer(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return self.a(x) if x.shape[-1] % 2 == 0 else self.b(x)


class BindsTheSameName(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        if x.shape[-1] % 2 == 0:
            y = self.bn(x)
        return self.a(y)


class LoopsByTheSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[-1] - 4):
            x = self.bn(x)
            y = self.a(x)
        return y


class CallsInAHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        if x.shape[-1] % 2:
            return self.other(x)
        return self.a(x)

    def other(self, x: Tensor) -> Tensor:
        return self.b(x)


UNSAFE = (
    PadsWhatTheNormMade, TakesAnotherLayer, BindsTheSameName, LoopsByTheSize, CallsInAHelper,
)  # fmt: skip


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_another_size_may_read_otherwise_is_declined(kind: type[Base]):
    model = randomize_norms_(kind().double().eval())
    result = rewrite.convert(model, ["fold"], example_inputs=(EVEN.double(),))
    assert "bn" not in [change.target for change in result.report.changes]
    for x in (EVEN, ODD):
        assert torch.allclose(result.model(x.double()), model(x.double()), rtol=0, atol=1e-12)
    reason = next(skip.reason for skip in result.report.skips if skip.target == "bn")
    assert "test_decisions.py:" in reason


class Before(Base):
    """The decision has nothing to do with the norm: it comes earlier, in a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(pad_to_even(x))
        return self.a(self.bn(x))


def pad_to_even(x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1, 0, 1))
    return x


class Complains(Base):
    def forward(self, x: Tensor) -> Tensor:
        _, c, height, width = x.shape
        assert height == width, "not square"
        if c != 4:
            raise ValueError(f"{c} channels")
        return self.a(self.bn(self.early(x)))


class NewTensors(Base):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.a(self.bn(self.early(x + torch.zeros(n, c, h, w))))


class StarredSizes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.bn(self.early(x + torch.ones(*x.shape[:2], *x.shape[2:]))))


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.f[-1](self.f[:-1](x))


@pytest.mark.parametrize("kind", [Before, Complains, NewTensors, StarredSizes, Sliced])
def test_a_size_that_decides_nothing_about_a_norm_stops_no_fold(kind: Any):
    model = randomize_norms_(kind().double().eval())
    captured = capture(model, EVEN.double())
    assert not captured.opaque
    result = rewrite.convert(model, ["fold"], example_inputs=(EVEN.double(),))
    assert {"bn", "f.1"} & {change.target for change in result.report.changes}
    x = EVEN.double() * 100 if kind is not Before else ODD.double()
    assert torch.allclose(result.model(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [NewTensors, Sliced])
def test_new_tensors_and_slices_need_no_example(kind: Any):
    assert not capture(kind()).opaque


class ByValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_branch_on_values_stays_opaque_and_every_skip_gives_the_line():
    result = rewrite.convert(ByValue().eval(), ["fold"], example_inputs=(EVEN,))
    assert not result.report.changes
    skip = next(skip for skip in result.report.skips if skip.target == "bn")
    assert "opaque" in skip.reason and "test_decisions.py:" in skip.reason
