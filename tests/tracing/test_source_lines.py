"""Which line of the model's own code runs, or raised."""

from __future__ import annotations

import inspect
import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from rewrite.provenance import shown_path
from rewrite.tracing.source_lines import (
    asked_by_model,
    reason_of,
    runs_in_torch,
    short,
    user_frame,
)


def raised(function: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def test_a_reason_is_the_first_sentence_with_its_class() -> None:
    def fails() -> None:
        raise ValueError("no such axis. Try another one\nsecond line")

    reason, source = reason_of(raised(fails))
    assert reason == "ValueError: no such axis"
    assert source == f"{shown_path(__file__)}:{fails.__code__.co_firstlineno + 1}"


def test_an_error_without_a_message_is_its_class() -> None:
    def fails() -> None:
        raise KeyError

    assert reason_of(raised(fails))[0] == "KeyError"


def test_an_error_raised_inside_of_torch_is_at_the_line_that_called_torch() -> None:
    def fails() -> None:
        torch.nn.functional.relu("text")

    _, source = reason_of(raised(lambda: fails()))
    assert source == f"{shown_path(__file__)}:{fails.__code__.co_firstlineno + 1}", (
        "the innermost line"
    )


def test_an_error_that_no_frame_of_the_model_saw_has_no_line() -> None:
    assert reason_of(ValueError("made, never raised")) == ("ValueError: made, never raised", None)


def test_the_user_frame_is_the_innermost_outside_of_the_machinery() -> None:
    frame = user_frame()
    assert frame is not None and frame.f_code.co_name == inspect.stack()[0].function


class Frames(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        self.seen = user_frame(), runs_in_torch()
        return x


def test_a_forward_is_found_through_the_frames_of_torch() -> None:
    model = Frames()
    torch.nn.Sequential(model)(1)
    frame, in_torch = model.seen
    assert frame is not None and frame.f_code is Frames.forward.__code__ and not in_torch


def test_what_torch_asks_itself_is_told_from_what_the_model_asks() -> None:
    answers: list[bool] = []

    class Watches(list[int]):
        def __iter__(self) -> Any:
            answers.append(runs_in_torch())
            return super().__iter__()

    iter(Watches())
    frame = frames_of(torch.nn.Linear(1, 1))
    assert answers == [False] and frame is not None
    assert not asked_by_model(frame), "a frame of torch.nn"
    assert asked_by_model(sys._getframe())


def test_a_question_that_reaches_the_tracer_from_torch_is_one_of_torch() -> None:
    tracer = str(Path(torch.__file__).parent / "fx" / "proxy.py")
    code = compile("lambda *_: answers.append(ask())", tracer, "eval")
    answers: list[bool] = []
    ask_in_tracer = eval(code, {"answers": answers, "ask": runs_in_torch})
    layer = torch.nn.Linear(1, 1)
    layer.register_forward_hook(ask_in_tracer)
    layer(torch.ones(1, 1))
    ask_in_tracer()
    assert answers == [True, False]


def frames_of(module: torch.nn.Module) -> FrameType | None:
    """Return the frame of torch that calls a hook."""
    found: list[FrameType | None] = []
    module.register_forward_hook(lambda *args: found.append(sys._getframe(1)))
    module(torch.ones(1, 1))
    return found[0]


def test_the_standard_library_does_not_ask_for_the_model() -> None:
    found: list[FrameType] = []

    class Seen(random.Random):
        def random(self) -> float:
            found.append(sys._getframe(1))
            return 0.5

        def getrandbits(self, bits: int, /) -> int:
            found.append(sys._getframe(1))
            return 0

    Seen().choice([1, 2])
    assert found and not asked_by_model(found[0])


def test_a_source_is_shortened_to_its_file_name() -> None:
    assert short("/a/b/model.py:12") == " at model.py:12" and short(None) == ""
