"""rewrite.graph.traits: every spelling of every operation is one row of the table."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

import rewrite
from rewrite.graph.capture import capture
from rewrite.graph.spellings import MODULES
from rewrite.graph.traits import OPERATIONS, Shape, Trait, call_of, operation

SPACES = (torch, F, torch.special, torch._C._nn, operator, torch.Tensor, torch.ops.aten)


def spelled() -> Iterator[tuple[str, Any]]:
    """Yield each canonical name with each function, packet and overload that is spelled so."""
    for row in OPERATIONS:
        for spelling in row.spellings:
            for space in SPACES:
                for name in (spelling, f"{spelling}_"):
                    found = getattr(space, name, None)
                    if found is None or not callable(found) or isinstance(found, type):
                        continue
                    yield row.name, found
                    if isinstance(found, torch._ops.OpOverloadPacket):
                        for overload in found.overloads():
                            yield row.name, getattr(found, overload)


def called(target: Any, *arguments: Any, method: bool = False, **keywords: Any) -> Node:
    graph = Graph()
    x = graph.placeholder("x")
    kind = graph.call_method if method else graph.call_function
    return kind(target, (x, *arguments), keywords)


def test_every_function_is_the_operation_that_it_spells() -> None:
    wrong = [
        (name, target)
        for name, target in spelled()
        if (row := operation(called(target))) is None or row.name != name
    ]
    assert not wrong
    assert len(list(spelled())) > 600


@pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: row.name)
def test_every_method_is_the_operation_that_it_spells(row) -> None:
    for spelling in row.spellings:
        for name in {spelling, f"{spelling}_"}:
            if hasattr(torch.Tensor, name) and not name.endswith("___"):
                found = operation(called(name, method=True))
                assert found is not None and found.name == row.name


def test_enough_traits_are_tried() -> None:
    tried = {row.name for row, _, _ in on_one_operand()}
    assert len(tried) > 65
    assert {"relu", "neg", "round", "max_pool2d", "avg_pool1d", "mean", "sum", "dropout"} <= tried


def test_no_spelling_is_two_operations() -> None:
    spellings = [spelling for row in OPERATIONS for spelling in row.spellings]
    assert len(set(spellings)) == len(spellings)


def test_every_name_in_torch_that_computes_alike_is_known() -> None:
    """The aliases that torch itself lists for the arithmetic of the table."""
    for names in (
        ("mul", "multiply"), ("div", "divide", "true_divide"), ("sub", "subtract"),
        ("neg", "negative"), ("abs", "absolute"), ("cat", "concat", "concatenate"),
        ("transpose", "swapaxes", "swapdims"), ("movedim", "moveaxis"), ("clamp", "clip"),
        ("trunc", "fix"),
    ):  # fmt: skip
        rows = {operation(called(getattr(torch, name))) for name in names}
        assert len(rows) == 1 and None not in rows


def test_a_function_of_other_code_is_not_known_by_its_name() -> None:
    def mul(x, y):
        return x

    def relu(x):
        return -x

    assert operation(called(mul)) is None
    assert operation(called(relu)) is None


@pytest.mark.parametrize("kind", list(MODULES), ids=lambda kind: kind.__name__)
def test_every_module_is_an_operation(kind) -> None:
    assert MODULES[kind] in {row.name for row in OPERATIONS}


class Own(nn.ReLU):
    def forward(self, input):
        return -input


def test_a_module_with_a_forward_of_its_own_is_none() -> None:
    model = nn.Sequential(nn.ReLU(), Own())
    captured = capture(model)
    calls = [call_of(captured, node) for node in captured.nodes()]
    assert [call.name for call in calls if call is not None] == ["relu", "neg"]


@pytest.mark.parametrize(
    ("target", "arguments", "keywords", "wanted"),
    [
        (torch.add, (2,), {}, (1, 1)),
        (torch.add, (), {"other": 2, "alpha": 3}, (1, 3)),
        (torch.sub, (2,), {"alpha": 3}, (1, -3)),
        (torch.rsub, (2,), {}, (-1, 1)),
        (torch.ops.aten.rsub.Scalar, (2, 3), {}, (-3, 1)),
        (operator.isub, (2,), {}, (1, -1)),
    ],
)
def test_the_weights_of_a_sum(target, arguments, keywords, wanted) -> None:
    node = called(target, *arguments, **keywords)
    row = operation(node)
    assert row is not None and Trait.ADDS in row.traits
    terms = rewrite.graph.traits.Call(row, node, None).terms()
    assert terms is not None
    assert terms[0][0] is node.args[0] and terms[1][0] == 2
    assert (terms[0][1], terms[1][1]) == wanted


# --- the equations --------------------------------------------------------------------------------

CALLS: dict[str, Any] = {
    "prelu": lambda f, x: f(x, torch.tensor([0.3], dtype=torch.float64)),
    "leaky_relu": lambda f, x: f(x, 0.2),
    "rrelu": lambda f, x: f(x, 0.1, 0.3, False),
    "dropout": lambda f, x: f(x, 0.5, False),
    "alpha_dropout": lambda f, x: f(x, 0.5, False),
    "mul": lambda f, x: f(x, -1.5), "div": lambda f, x: f(x, -1.5),
    "to": lambda f, x: f(x, torch.float64), "type": lambda f, x: f(x, torch.float64),
    "pow": lambda f, x: f(x, 2), "clamp": lambda f, x: f(x, -1, 1),
    "clamp_min": lambda f, x: f(x, 0.5), "clamp_max": lambda f, x: f(x, -0.5),
    "hardtanh": lambda f, x: f(x, -1, 1), "threshold": lambda f, x: f(x, 0.1, 0.2),
    **{f"{kind}_pool{n}d": lambda f, x, n=n: f(x[(0,) * (3 - n)] if n < 3 else x, 2)
       for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)},
    **{name: lambda f, x: f(x, -1) for name in (
        "mean", "sum", "amax", "amin", "softmax", "log_softmax", "cumsum", "softmin")},
}  # fmt: skip


def on_one_operand() -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """Yield each row with a call of it on one operand, and the operand, where there is one."""
    moves = Trait.MOVES | Trait.JOINS | Trait.SPLITS | Trait.ASKS | Trait.CONTRACTS
    generator = torch.Generator().manual_seed(0)
    numbers = 16 * torch.randn(1, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    # Numbers that bfloat16 can hold, and three times as large ones.
    x = numbers.round().clamp(-40, 40) / 8
    for row in OPERATIONS:
        functions = (getattr(space, row.name, None) for space in (F, torch, torch.Tensor))
        function = next((f for f in functions if callable(f)), None)
        if function is None or row.traits & (moves | Trait.ADDS | Trait.LIKE_SECOND):
            continue
        call = partial(CALLS.get(row.name, lambda f, x: f(x)), function)
        try:
            y = call(x.clone())
        except (TypeError, RuntimeError, ValueError):
            continue
        if isinstance(y, torch.Tensor) and y.is_floating_point():
            yield row, call, x


@pytest.mark.parametrize(
    ("row", "call", "x"),
    [pytest.param(row, call, x, id=row.name) for row, call, x in on_one_operand()],
)
def test_the_traits_are_true(row, call, x) -> None:
    """Each claim about an operation of one operand holds on numbers; what is not claimed does not.

    Operations on two values are in `tests/fold/test_spellings.py`, those that move axes in the
    random chains.
    """
    y = call(x)

    def holds(got: torch.Tensor, want: torch.Tensor) -> bool:
        return torch.allclose(got.double(), want.double(), rtol=1e-10, atol=1e-12, equal_nan=True)

    true = Trait.NONE
    if holds(call(3 * x), 3 * y):
        true |= Trait.SCALES_POSITIVE
        if holds(call(-3 * x), -3 * y):
            true |= Trait.SCALES
    if holds(call(x + 0.25), y + 0.25):
        true |= Trait.SHIFTS
    if not call(torch.zeros_like(x)).any():
        true |= Trait.ZERO
    equations = Trait.SCALES | Trait.SHIFTS
    claimed = row.traits & (Trait.SCALES | Trait.SHIFTS | Trait.ZERO)
    assert claimed in true
    if row.shape is Shape.SAME and row.name not in ("cumsum", "normalize"):
        assert claimed & equations == true & equations


# --- memory ---------------------------------------------------------------------------------------

MOVED: dict[str, Any] = {
    "permute": lambda f, x: f(x, (0, 2, 1, 3)), "transpose": lambda f, x: f(x, 1, 2),
    "movedim": lambda f, x: f(x, 1, 2), "narrow": lambda f, x: f(x, 1, 0, 2),
    "index_select": lambda f, x: f(x, 1, torch.tensor([0, 1])), "roll": lambda f, x: f(x, 0, 1),
    "flip": lambda f, x: f(x, (1,)), "repeat": lambda f, x: f(x, 1, 1, 1, 1),
    "tile": lambda f, x: f(x, (1,)), "view": lambda f, x: f(x, 4, 16),
    "expand": lambda f, x: f(x, 1, 4, 4, 4), "unsqueeze": lambda f, x: f(x, 0),
    "unflatten": lambda f, x: f(x, 1, (2, 2)), "select": lambda f, x: f(x, 1, 0),
    "chunk": lambda f, x: f(x, 2, 1)[0], "split": lambda f, x: f(x, 2, 1)[0],
    "tensor_split": lambda f, x: f(x, 2, 1)[0], "unbind": lambda f, x: f(x, 1)[0],
    "cat": lambda f, x: f([x, x]), "stack": lambda f, x: f([x]), "rot90": lambda f, x: f(x, 0),
    "pixel_shuffle": lambda f, x: f(x, 1), "channel_shuffle": lambda f, x: f(x, 1),
    **{name: lambda f, x: f(x, x) for name in ("type_as", "expand_as", "reshape_as")},
}  # fmt: skip


@pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: row.name)
def test_what_shares_memory_says_so(row) -> None:
    call = MOVED.get(row.name) or CALLS.get(row.name) or (lambda f, x: f(x))
    for space in (torch.Tensor, torch, F):
        function = getattr(space, row.name, None)
        if not callable(function):
            continue
        x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
        try:
            y = call(function, x)
        except (TypeError, RuntimeError, ValueError, IndexError):
            continue
        if isinstance(y, torch.Tensor):
            shares = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert not shares or Trait.VIEWS in row.traits


def test_a_write_through_a_view_by_any_alias_is_seen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            torch.swapdims(y, 1, 2).mul_(2)
            return y + 1

    captured = capture(Model())
    conv = next(node for node in captured.nodes() if node.op == "call_module")
    assert captured.effects.late_write(conv) is not None
