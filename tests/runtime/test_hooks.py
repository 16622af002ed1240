"""Hooks see every call, may exchange its output, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.hooks import hooked, run
from rewrite.runtime.inputs import Inputs


def test_each_call_is_seen_with_its_input_and_output_and_the_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    seen: list[tuple[int, Tensor, Tensor]] = []

    def note(index: int, given: Tensor, made: Tensor) -> None:
        seen.append((index, given, made))

    x = torch.randn(2, 3)
    with hooked([model[1], model[0]], note):
        y = model(x)
    assert [index for index, _, _ in seen] == [1, 0]
    assert torch.equal(seen[0][1], x) and torch.equal(seen[1][2], y)
    model(x)
    assert len(seen) == 2


def test_what_a_hook_returns_goes_on() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with hooked([model[0]], lambda index, given, made: made * 0):
        assert not model(torch.randn(2, 3)).any()


def test_an_error_inside_takes_the_hooks_off() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ZeroDivisionError), hooked([model], lambda *_: 1 / 0):  # type: ignore[arg-type]
        model(torch.randn(2, 3))
    assert not model._forward_hooks


def test_an_input_that_the_model_rejects_is_named() -> None:
    with pytest.raises(OptionError, match="the model rejects it"):
        run(nn.Linear(3, 3), Inputs.of(torch.randn(2, 5)))
