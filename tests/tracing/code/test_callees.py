"""rewrite.tracing.code.callees: functions that code takes from a table and gives a module."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite


def doubles_after_a_norm(module: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if isinstance(module.bn, nn.BatchNorm2d) else x


def keeps(module: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(x) if module.training else x


TABLE = {"a": doubles_after_a_norm, "b": keeps}
PARTIALS = (partial(doubles_after_a_norm), keeps)
HARMLESS = {"a": keeps, "b": keeps}


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.conv, self.bn = "a", nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)


class OfATable(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return TABLE[self.kind](self, self.bn(self.conv(x)))


class ByALocalName(Holds):
    def forward(self, x: Tensor) -> Tensor:
        interface = TABLE[self.kind]
        return interface(self, self.bn(self.conv(x)))


class WithADefault(Holds):
    def forward(self, x: Tensor) -> Tensor:
        interface = TABLE.get(self.kind, keeps)
        return interface(module=self, x=self.bn(self.conv(x)))


class OfPartials(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return PARTIALS[0](self, self.bn(self.conv(x)))


class ByAnAssignment(Holds):
    def forward(self, x: Tensor) -> Tensor:
        interface = keeps
        if self.kind == "a":
            interface = doubles_after_a_norm
        return interface(self, self.bn(self.conv(x)))


class OfAHarmlessTable(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return HARMLESS[self.kind](self, self.bn(self.conv(x)))


class OfALibrary(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * math.sqrt(len(self.kind))


TESTS = (OfATable, ByALocalName, WithADefault, OfPartials, ByAnAssignment)


@pytest.mark.parametrize("kind", [*TESTS, OfAHarmlessTable, OfALibrary], ids=lambda k: k.__name__)
def test_a_function_of_a_table_that_tests_the_norm_keeps_it(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = models.randomize_norms_(kind().eval()).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
    assert len(result.report.changes) == (kind not in TESTS)
    if kind in TESTS:
        (skip,) = result.report.skips
        assert skip.reason.startswith("isinstance(module.bn, nn.BatchNorm2d) at test_callees.py:")
