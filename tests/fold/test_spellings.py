"""Every spelling of arithmetic folds alike, or is skipped with its reason: never nothing."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from passes import FoldNorm
from rewrite.graph.traits import OPERATIONS
from rewrite.protocol import Applied, apply_pass

RIGHT = 1e-11
ROWS = {row.name: row for row in OPERATIONS}
Form = Callable[[Tensor, Any], Tensor]


def forms(name: str) -> Iterator[tuple[str, Form]]:
    """Yield every way to write an operation on two operands, from the table's spellings."""
    aten = torch.ops.aten
    for spelling in ROWS[name].spellings:
        for home, space in (("torch", torch), ("operator", operator), ("aten", aten)):
            function = getattr(space, spelling, None)
            if function is None:
                continue
            yield f"{home}.{spelling}", lambda x, c, f=function: f(x, c)
            if home == "torch":
                yield f"torch.{spelling}(other=)", lambda x, c, f=function: f(x, other=c)
                yield (
                    f"torch.{spelling}(input=, other=)",
                    lambda x, c, f=function: f(input=x, other=c),
                )
            if home == "aten":
                yield f"aten.{spelling}.Tensor", lambda x, c, f=function: f.Tensor(x, c)
        for method in (spelling, f"{spelling}_"):
            if hasattr(torch.Tensor, method) and not method.endswith("___"):
                yield f".{method}()", lambda x, c, m=method: getattr(x, m)(c)


class Model(nn.Module):
    """conv -> operation -> conv, with a constant per channel or with a norm behind it."""

    def __init__(self, form: Form, constant: Any, norm: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.two = nn.Conv2d(4, 2, 1)
        self.form = form
        if isinstance(constant, Tensor):
            self.constant = nn.Parameter(constant)
        else:
            self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.form(self.one(x), self.constant)))


def fold(form: Form, constant: Any, norm: bool) -> Applied | None:
    """Fold and compare; None if PyTorch has no such form."""
    torch.manual_seed(0)
    model = models.randomize_norms_(Model(form, constant, norm)).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        try:
            want = model(x)
        except (TypeError, AttributeError, RuntimeError, NotImplementedError):
            return None
    applied = apply_pass(FoldNorm(), copy.deepcopy(model), (x,))
    for size, batch in ((1.0, 2), (100.0, 3)):
        y = size * torch.randn(batch, 3, 5, 5, dtype=torch.float64)
        with torch.no_grad():
            want, got = model(y), applied.model(y)
        assert (got - want).abs().max() <= RIGHT * want.abs().max()
    return applied


ARITHMETIC = [
    pytest.param(name, form, id=label)
    for name in ("add", "sub", "rsub", "mul", "div")
    for label, form in forms(name)
]


def per_channel() -> Tensor:
    return torch.rand(4, 1, 1, dtype=torch.float64) + 0.5


@pytest.mark.parametrize(("name", "form"), ARITHMETIC)
def test_a_constant_per_channel_folds_alike(name: str, form: Form) -> None:
    applied = fold(form, per_channel(), norm=False)
    if applied is not None:
        assert len(applied.changes) == 1, applied.skips
        assert not applied.skips


def test_the_forms_are_many() -> None:
    exist = [
        label
        for name in ("add", "sub", "rsub", "mul", "div")
        for label, form in forms(name)
        if fold(form, per_channel(), norm=False) is not None
    ]
    assert len(exist) > 60
    assert {"torch.multiply", "torch.true_divide", ".mul_()", "aten.div.Tensor"} <= set(exist)


@pytest.mark.parametrize(("name", "form"), ARITHMETIC)
def test_a_number_before_a_norm_is_the_same_function(name: str, form: Form) -> None:
    """The norm folds into the convolution behind it, whatever the number does."""
    applied = fold(form, 1.5, norm=True)
    if applied is not None:
        assert len(applied.changes) == 1


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda x, c: torch.div(x, c, rounding_mode="floor"), "rounds its quotient"),
        (lambda x, c: x.div_(c, rounding_mode="trunc"), "rounds its quotient"),
        (lambda x, c: torch.floor_divide(x, c), "rounds its quotient"),
        (lambda x, c: c / x, "divides a constant by the value"),
    ],
)
def test_what_is_no_map_per_channel_is_skipped_with_its_reason(form: Form, reason: str) -> None:
    applied = fold(form, per_channel(), norm=False)
    assert applied is not None
    assert not applied.changes
    assert [reason in skip.reason for skip in applied.skips] == [True]


@torch.fx.wrap
def multiply(x: Tensor, c: Tensor) -> Tensor:
    """Something else than its name says."""
    return x + c


def test_an_unknown_function_leaves_a_skip_with_its_name() -> None:
    applied = fold(lambda x, c: multiply(x, c), per_channel(), norm=False)
    assert applied is not None
    assert not applied.changes
    assert "multiply is not an operation that folding knows" in applied.skips[0].reason


@pytest.mark.parametrize(
    ("form", "folds"),
    [
        (lambda x, c: torch.add(x, c, alpha=2), 1),
        (lambda x, c: torch.sub(x, c, alpha=0.5), 1),
        (lambda x, c: torch.rsub(x, c, alpha=3), 1),
        (lambda x, c: c - x, 1),
        (lambda x, c: 2 * c * x, 1),
        (lambda x, c: x * c.to(torch.int32), 0),
    ],
)
def test_weights_of_a_sum_count(form: Form, folds: int) -> None:
    applied = fold(form, per_channel(), norm=False)
    assert applied is not None
    assert len(applied.changes) == folds


@pytest.mark.parametrize(
    "cast",
    [
        lambda y: y.to(torch.int32).to(y.dtype), lambda y: y.type(torch.int64).double(),
        lambda y: y.int().double(), lambda y: torch.round(y), lambda y: torch.fix(y),
        lambda y: y.view(torch.int64).double() / 2**62, lambda y: y // 0.25,
        lambda y: torch.div(y, 0.25, rounding_mode="trunc"), lambda y: torch.remainder(y, 0.5),
    ],
)  # fmt: skip
def test_what_rounds_lets_no_norm_pass(cast: Callable[[Tensor], Tensor]) -> None:
    """The norm behind it cannot go into the convolution before it."""

    class Rounded(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(cast(4 * self.one(x))).relu()

    torch.manual_seed(0)
    model = models.randomize_norms_(Rounded(operator.add, 0, norm=True)).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    applied = apply_pass(FoldNorm(), copy.deepcopy(model), (x,))
    assert not applied.changes
    assert len(applied.skips) == 1
    with torch.no_grad():
        assert torch.equal(applied.model(x), model(x))
