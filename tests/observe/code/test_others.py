"""Another value in the place of a stream, or given by a caller, and the line that says so."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm
from tests.observe.code.chooses import Stream, X, built, check


def into_a_stream(self: Any, x: Tensor, flag: int = 0) -> Any:
    if flag:  # noqa: SIM108
        h = self.other(x)
    else:
        h = self.embed(x)
    return self.head(self.norm(h))


def into_a_stream_at_a_place(self: Any, x: Tensor, flag: int = 0) -> Any:
    held = [self.embed(x), self.other(x)]
    return self.head(self.norm(held[flag]))


def around_a_stream(self: Any, x: Tensor, flag: int = 0) -> Any:
    if flag:
        return self.other(self.embed(x))[..., :4]
    return self.head(self.norm(self.embed(x)))


@pytest.mark.parametrize(
    "forward", [into_a_stream, into_a_stream_at_a_place, around_a_stream], ids=lambda f: f.__name__
)
def test_a_stream_that_another_value_may_join_is_not_centred(forward: Any) -> None:
    check(forward, LayerNormToRMSNorm(), Stream())


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
