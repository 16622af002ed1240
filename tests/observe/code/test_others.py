"""Another value in the place of the one that is followed, on a way that no observed call took."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm
from tests.observe.blocks import untraceable

X = torch.randn(2, 3, 16, dtype=torch.float64)


class Stream(nn.Module):
    """x + f(norm(x)), and a norm: what writes to x is a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mid = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, h: Tensor) -> Any:
        h = h + self.mid(self.norm1(h))
        return self.norm2(h)


class Model(nn.Module):
    """`embed` is followed into `norm`, and `norm` into `head`; `other` may stand in their place."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = norm, nn.Linear(16, 4)

    def features(self, x: Tensor, flag: int) -> Any:
        if flag:
            return self.other(x)
        return self.norm(self.embed(x))

    def finish(self, h: Tensor, y: Tensor | None = None) -> Any:
        if y is not None:
            h = y
        return self.head(h)


def behind_a_branch(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag:
        h = self.other(x)
    return self.head(h)


def in_the_other_branch(self: Any, x: Tensor, flag: int = 0) -> Any:
    if flag:  # noqa: SIM108
        h = self.other(x)
    else:
        h = self.norm(self.embed(x))
    return self.head(h)


def in_an_expression(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.other(x) if flag else self.norm(self.embed(x))
    return self.head(h)


def by_another_name(self: Any, x: Tensor, flag: int = 0) -> Any:
    y = self.other(x)
    h = self.norm(self.embed(x))
    if flag:
        h = y
    return self.head(h) + 0 * y.sum()


def before(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.other(x)
    if not flag:
        h = self.norm(self.embed(x))
    return self.head(h)


def where_nothing_was(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = None
    if flag:
        h = self.other(x)
    if h is None:
        h = self.norm(self.embed(x))
    return self.head(h)


def in_a_handler(self: Any, x: Tensor, flag: int = 0) -> Any:
    try:
        if flag:
            raise ValueError
        h = self.norm(self.embed(x))
    except ValueError:
        h = self.other(x)
    return self.head(h)


def in_a_loop(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    for _ in range(flag):
        h = self.other(x)
        if flag:
            break
    return self.head(h)


def in_a_case(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    match flag:
        case 1:
            h = self.other(x)
    return self.head(h)


def in_a_test(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag and (h := self.other(x)) is not None:
        pass
    return self.head(h)


def in_a_tuple(self: Any, x: Tensor, flag: int = 0) -> Any:
    h, y = self.norm(self.embed(x)), x
    if flag:
        h, y = self.other(x), x
    return self.head(h) + 0 * y.sum()


def in_a_row(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag:
        h[:, 0] = self.other(x)[:, 0]
    return self.head(h)


def under_a_key(self: Any, x: Tensor, flag: int = 0) -> Any:
    held = {"h": self.norm(self.embed(x))}
    if flag:
        held.update(h=self.other(x))
    return self.head(held["h"])


def at_a_place(self: Any, x: Tensor, flag: int = 0) -> Any:
    held = [self.norm(self.embed(x)), self.other(x)]
    return self.head(held[flag])


def from_a_method(self: Any, x: Tensor, flag: int = 0) -> Any:
    return self.head(self.features(x, flag))


def into_a_method(self: Any, x: Tensor, flag: int = 0) -> Any:
    return self.finish(self.norm(self.embed(x)), self.other(x) if flag else None)


def into_a_stream(self: Any, x: Tensor, flag: int = 0) -> Any:
    if flag:  # noqa: SIM108
        h = self.other(x)
    else:
        h = self.embed(x)
    return self.head(self.norm(h))


def into_a_stream_by_a_row(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.embed(x)
    if flag:
        h[:, 0] = self.other(x)[:, 0]
    return self.head(self.norm(h))


def into_a_stream_at_a_place(self: Any, x: Tensor, flag: int = 0) -> Any:
    held = [self.embed(x), self.other(x)]
    return self.head(self.norm(held[flag]))


def around_a_stream(self: Any, x: Tensor, flag: int = 0) -> Any:
    if flag:
        return self.other(self.embed(x))[..., :4]
    return self.head(self.norm(self.embed(x)))


FOLD = [
    behind_a_branch, in_the_other_branch, in_an_expression, by_another_name, before,
    where_nothing_was, in_a_handler, in_a_loop, in_a_case, in_a_test, in_a_tuple, in_a_row,
    under_a_key, at_a_place, from_a_method, into_a_method,
]  # fmt: skip
STREAM = [into_a_stream, into_a_stream_by_a_row, into_a_stream_at_a_place, around_a_stream]


def built(forward: Any, norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = type("Chooses", (Model,), {"forward": untraceable(forward)})(norm)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


def check(forward: Any, pass_: Any, norm: nn.Module) -> None:
    """Nothing is changed that another value of `flag` would show; the reason names the line."""
    model = built(forward, norm)
    result = rewrite.convert(model, pass_, example_inputs=X)
    with torch.no_grad():
        for flag in (0, 1):
            a, b = model(X.clone(), flag), result.model(X.clone(), flag)
            assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    assert not result.report.changes
    assert result.report.skips


@pytest.mark.parametrize("forward", FOLD, ids=lambda f: f.__name__)
def test_a_reader_that_another_value_may_feed_is_not_folded_into(forward: Any) -> None:
    check(forward, FoldNorm(), nn.LayerNorm(16))


@pytest.mark.parametrize("forward", STREAM, ids=lambda f: f.__name__)
def test_a_stream_that_another_value_may_join_is_not_centred(forward: Any) -> None:
    check(forward, LayerNormToRMSNorm(), Stream())


def alone(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag:
        x = self.other(x)
    y = self.head(h)
    return y + 1 if flag else y


def decided(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if self.training:
        h = self.other(x)
    return self.head(h)


def unpacked(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    y, z = self.head(h), self.other(x)
    if flag:
        z = z + 1
    return y + 0 * z.sum()


@pytest.mark.parametrize("forward", [alone, decided, unpacked], ids=lambda f: f.__name__)
def test_other_values_beside_it_stop_nothing(forward: Any) -> None:
    """The twin: the same words, where nothing reaches the reader but the value."""
    model = built(forward, nn.LayerNorm(16))
    result = rewrite.convert(model, FoldNorm(), example_inputs=X)
    assert [change.target for change in result.report.changes] == ["norm"]
    with torch.no_grad():
        for flag in (0, 1):
            assert torch.allclose(model(X, flag), result.model(X, flag), rtol=0, atol=1e-12)


def test_code_that_is_in_no_file_is_refused() -> None:
    """A class from a prompt: nothing can be said of the lines that no call took."""
    source = """
class Typed(Base):
    @untraceable
    def forward(self, x, flag=0):
        h = self.norm(self.embed(x))
        if flag:
            h = self.other(x)
        return self.head(h)
"""
    known: dict[str, Any] = {"Base": Model, "untraceable": untraceable, "__name__": __name__}
    exec(source, known)
    model = known["Typed"](nn.LayerNorm(16)).double().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    result = rewrite.convert(model, FoldNorm(), example_inputs=X)
    assert not result.report.changes and result.report.skips


def given(self: Any, x: Tensor, hidden: Tensor | None = None) -> Any:
    if hidden is None:
        hidden = self.norm(self.embed(x))
    return self.head(hidden)


def given_or_not(self: Any, x: Tensor, memory: Tensor | None = None) -> Any:
    hidden = self.norm(self.embed(x))
    source = hidden if memory is None else memory
    return self.head(source)


@pytest.mark.parametrize("forward", [given, given_or_not])
def test_what_a_caller_gives_in_its_place_may_be_anything(forward: Any) -> None:
    model = built(forward, nn.LayerNorm(16))
    result = rewrite.convert(model, FoldNorm(), example_inputs=X)
    assert not result.report.changes
    (skip,) = result.report.skips
    assert ("hidden" if forward is given else "memory") in skip.reason
    other = torch.randn_like(model.norm(model.embed(X)))
    assert torch.equal(model(X, other), result.model(X, other))


@pytest.mark.parametrize("forward", [given, given_or_not])
def test_in_transformers_it_is_what_the_model_returned_before_and_noted(forward: Any) -> None:
    model = built(forward, nn.LayerNorm(16))
    model.config = SimpleNamespace(model_type="own")
    result = rewrite.convert(model, FoldNorm(), example_inputs=X)
    (change,) = result.report.changes
    assert "has to come from the new model where it is given" in change.note
    with torch.no_grad():
        one = model(X, model.norm(model.embed(X)))
        two = result.model(X, result.model.norm(result.model.embed(X)))
    assert torch.allclose(one, two, rtol=0, atol=1e-12)


def test_the_line_of_the_other_value_is_the_reason() -> None:
    _, first = inspect.getsourcelines(into_a_stream)
    model = built(into_a_stream, Stream())
    (skip,) = rewrite.convert(model, LayerNormToRMSNorm(), example_inputs=X).report.skips
    assert f"put in its place at test_others.py:{first + 2}" in skip.reason
