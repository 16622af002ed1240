"""Every operator in place becomes a value in every spelling, or is declined; none is missed."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from passes import FoldNorm, OutOfPlace, Rebalance
from rewrite.protocol import apply_pass
from rewrite.tracing.proxies import AUGMENTED
from tests.streams.blocks import error

REALS = {
    "iadd": 1.5, "isub": 0.5, "imul": 2.0, "itruediv": 3.0, "ifloordiv": 0.3, "imod": 0.7,
    "ipow": 2.0,
}  # fmt: skip
WHOLE = {"iand": 6, "ior": 9, "ixor": 3, "ilshift": 2, "irshift": 1}
NO_FORM = {"iand": "and_", "ior": "or_"}
"""Those on bits that are declined, by what the trace calls each."""

FORMS = ("function", "function, dropped", "method")


class Net(nn.Module):
    """An operator in place on what a convolution wrote, before or behind its norm."""

    def __init__(self, name: str, number: float, form: str, *, behind: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)
        self.name, self.number, self.form, self.behind = name, number, form, behind

    def write(self, y: Tensor) -> Tensor:
        function: Any = getattr(operator, self.name)
        if self.form == "function":
            return function(y, self.number)
        if self.form == "method":
            getattr(y, f"__{self.name}__")(self.number)
        else:
            function(y, self.number)
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y if self.behind else self.write(y)
        y = self.bn(y)
        y = self.write(y) if self.behind else y
        return self.out(y.relu())


class Statement(Net):
    """The same, as a statement."""

    def write(self, y: Tensor) -> Tensor:
        match self.name:
            case "iadd":
                y += self.number
            case "isub":
                y -= self.number
            case "imul":
                y *= self.number
            case "itruediv":
                y /= self.number
            case "ifloordiv":
                y //= self.number
            case "imod":
                y %= self.number
            case "ipow":
                y **= self.number
        return y


class Bits(Net):
    def forward(self, x: Tensor) -> Tensor:
        bits = (x * 8).long().abs()
        return self.out(self.conv(x)) + self.write(bits).sum().to(x.dtype)


def nets(name: str, *, behind: bool) -> list[nn.Module]:
    made: list[nn.Module] = [Net(name, REALS[name], form, behind=behind) for form in FORMS]
    made.append(Statement(name, REALS[name], "statement", behind=behind))
    return [models.randomize_norms_(model).double().eval() for model in made]


X = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8)


def test_the_table_has_every_operator_of_a_tensor() -> None:
    assert {f"__{name}__" for name in (*REALS, *WHOLE)} == AUGMENTED.keys()


@pytest.mark.parametrize("name", REALS)
def test_each_becomes_a_value_in_every_spelling(name: str) -> None:
    for model in nets(name, behind=True):
        applied = apply_pass(OutOfPlace(), copy.deepcopy(model), (X,))
        assert len(applied.changes) == 1 and not applied.skips
        assert error(model, applied.model, X) < 1e-13
        again = apply_pass(OutOfPlace(), copy.deepcopy(applied.model), (X,))
        assert not again.changes and not again.skips  # nothing is written any more


@pytest.mark.parametrize("name", WHOLE)
def test_so_do_the_operators_on_bits_or_are_declined(name: str) -> None:
    model = Bits(name, WHOLE[name], "function, dropped", behind=True).double().eval()
    applied = apply_pass(OutOfPlace(), copy.deepcopy(model), (X,))
    if name in NO_FORM:
        (skip,) = applied.skips
        assert skip.reason.endswith(f"{NO_FORM[name]} has no form that returns a new tensor")
        assert not applied.changes
    else:
        assert len(applied.changes) == 1 and not applied.skips
    assert error(model, applied.model, X) < 1e-13


class Product(nn.Module):
    """The negative twin: a tensor has no `@=` of its own, and x is what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.fc(x)
        x @= self.weight
        return x + kept


def test_a_product_is_no_write() -> None:
    torch.manual_seed(0)
    model, x = Product().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    applied = apply_pass(OutOfPlace(), copy.deepcopy(model), (x,))
    assert not applied.changes and not applied.skips
    assert torch.equal(model(x), applied.model(x))


@pytest.mark.parametrize("pass_", [FoldNorm(), Rebalance(objective="l2")], ids=lambda p: p.name)
def test_no_pass_overlooks_one(pass_: rewrite.Pass) -> None:
    """Before the norm none may be folded over; a scale of channels is not that of a power."""
    for behind in (False, True):
        for name in ("iadd", "imul", "imod", "ipow"):
            for model in nets(name, behind=behind):
                made = rewrite.convert(copy.deepcopy(model), pass_, example_inputs=X, verify=False)
                assert made.report.changes or made.report.skips
                assert error(model, made.model, X) < 1e-13
