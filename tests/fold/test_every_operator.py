"""Each operator of torch beside a norm: norm and constant fold, or leave a reason."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from passes import FoldNorm
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
"""Operators warn of what they are about to lose; nothing of that is this test's."""

Form = Callable[[Tensor, Tensor], Tensor]
Function = Callable[..., Any]

FORMS: Mapping[str, Callable[[Function], Form]] = {
    "f(x)": lambda f: lambda x, c: f(x),
    "f(x, 0.7)": lambda f: lambda x, c: f(x, 0.7),
    "f(x, 2)": lambda f: lambda x, c: f(x, 2),
    "f(x, x)": lambda f: lambda x, c: f(x, x),
    "f(x, c)": lambda f: lambda x, c: f(x, c),
    "f(c, x)": lambda f: lambda x, c: f(c, x),
    "f(x, c, c)": lambda f: lambda x, c: f(x, c, c),
    "f(x > 0, x, c)": lambda f: lambda x, c: f(x > 0, x, c),
    "f(x, max=c)": lambda f: lambda x, c: f(x, max=c),
}

NOT_NUMERIC = {
    "torch.Tensor.to", "torch.Tensor.type_as", "torch.Tensor.expand_as", "torch.Tensor.new_tensor",
    "torch.Tensor.view_as", "torch.Tensor.reshape_as",
}  # fmt: skip
"""What reads the shape or the type of a constant, and no number of it."""

NOT_CALLED = {
    "compile", "load", "save", "manual_seed", "seed", "set_printoptions", "fork", "wait",
    "exec", "backward", "cuda", "resize_as", "empty_like", "binomial",
}  # fmt: skip
"""What is no operator, or does more than to compute: `binomial` draws, and often the same."""


def functions() -> Iterator[tuple[str, Function]]:
    """Yield what torch, its functional spaces, Python's operators and tensors have, once a name.

    What works in place is another spelling (`tests/fold/test_spellings.py`), what drops values
    is random.
    """
    seen: set[str] = set(NOT_CALLED)
    for home, space in (
        ("torch", torch), ("F", F), ("torch.special", torch.special),
        ("torch.linalg", torch.linalg), ("operator", operator), ("torch.Tensor", Tensor),
    ):  # fmt: skip
        for name in dir(space):
            function = getattr(space, name)
            other = name.startswith(("_", "set_", "is_", "get_")) or name[-1] == "_"
            other = other or name in seen or "dropout" in name
            if not other and callable(function) and not isinstance(function, type):
                seen.add(name)
                yield f"{home}.{name}", function if space is not Tensor else _method(name)


def _method(name: str) -> Function:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


class Branch(nn.Module):
    """conv, operator, norm; norm, operator, conv: the map goes through it either way."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.behind, self.before = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.c = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.form = form
        with torch.no_grad():
            self.one.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.behind(self.form(self.one(x), self.c)))
        return self.two(self.form(self.before(y), self.c))


class Branches(nn.Module):
    """All of them, so that one capture reads them all."""

    def __init__(self, forms: Mapping[str, Form]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(form) for form in forms.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


SIZES = (2, 3, 4, 4)


def fits(form: Form) -> bool:
    """Return whether a form maps four channels to four, and computes the same when called again."""
    x = torch.rand(2, 4, 4, 4, dtype=torch.float64)
    try:
        y = form(x, torch.rand(4, 1, 1, dtype=torch.float64))
        if not isinstance(y, Tensor) or y.shape[1:2] != (4,) or y.dtype is not x.dtype:
            return False
        branch = models.randomize_norms_(Branch(form)).double().eval()
        given = 3 * torch.rand(SIZES, dtype=torch.float64)
        one, *others = (branch(given) for _ in range(5))  # a draw may be the same twice
    except Exception:  # noqa: BLE001  # whatever an operator raises that takes no such arguments
        return False
    return not one.is_meta and all(torch.allclose(one, y, equal_nan=True) for y in others)


@pytest.fixture(scope="module")
def forms() -> dict[str, Form]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            f"{name}: {shape}": make(function)
            for name, function in functions()
            for shape, make in FORMS.items()
            if fits(make(function))
        }


@pytest.fixture(scope="module")
def folded(forms: dict[str, Form]) -> tuple[nn.Module, Applied]:
    torch.manual_seed(0)
    model = models.randomize_norms_(Branches(forms)).double().eval()
    x = torch.rand(SIZES, dtype=torch.float64)
    return model, apply_pass(FoldNorm(), copy_model(model), (x,))


def test_the_operators_are_many(forms: dict[str, Form]) -> None:
    assert len(forms) > 300
    assert {"torch.maximum: f(x, c)", "torch.pow: f(x, c)", "torch.clamp: f(x, c, c)"} <= set(forms)


def test_every_norm_and_every_constant_beside_an_operator_is_told_of(
    forms: dict[str, Form], folded: tuple[nn.Module, Applied]
) -> None:
    told = {change.target for change in folded[1].changes}
    told |= {skip.target for skip in folded[1].skips if skip.reason}
    silent = []
    for number, label in enumerate(forms):
        name, _, shape = label.partition(": ")
        wanted = ["behind", "before"]
        if "c" in shape and name not in NOT_NUMERIC:
            wanted.append("c")
        silent += [f"{label}: {w}" for w in wanted if f"branches.{number}.{w}" not in told]
    assert not silent, "\n".join(silent)


def test_what_folds_beside_an_operator_computes_the_same(
    forms: dict[str, Form], folded: tuple[nn.Module, Applied]
) -> None:
    model, applied = folded
    x = 3 * torch.rand(SIZES, dtype=torch.float64)
    with torch.no_grad():
        pairs = list(zip(model(x), applied.model(x), strict=True))
    wrong = []
    for label, (want, got) in zip(forms, pairs, strict=True):
        size = want.nan_to_num(0, 0, 0).abs().max()
        if not torch.allclose(got, want, rtol=1e-9, atol=1e-11 * float(size), equal_nan=True):
            wrong.append(f"{label}: {(got - want).nan_to_num(0, 0, 0).abs().max() / size}")
    assert not wrong, "\n".join(wrong)
    assert len(applied.changes) > len(forms) / 10
