"""rewrite.progress: which step runs, how long the rest takes, and silence where nobody looks."""

import io
import sys
import time

import pytest
import torch
from torch import nn

import models
import rewrite
from rewrite.progress import Announced, Countdown, ProgressLine, counted, duration


class Clock:
    """A clock that goes on by a number of seconds each time it is read."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = -seconds, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def test_the_time_left_is_that_of_the_steps_to_do_at_the_pace_of_those_done() -> None:
    said: list[str] = []
    step = Countdown(said.append, "verifying", 4, Clock(30.0))
    for name in ("given", "zeros", "", "wide"):
        step(name)
    assert said == [
        "verifying: given, 1 of 4",
        "verifying: zeros, 2 of 4, about 2 min left",
        "verifying 3 of 4, about 60 s left",
        "verifying: wide, 4 of 4, about 30 s left",
    ]


def test_short_work_and_work_without_a_known_end_make_no_promise() -> None:
    said: list[str] = []
    for total, seconds in ((3, 0.1), (0, 50.0)):
        step = Countdown(said.append, "copying", total, Clock(seconds))
        step()
        step()
    assert said == ["copying 1 of 3", "copying 2 of 3", "copying 1", "copying 2"]
    said.clear()
    step = Countdown(said.append, "copying", 1, Clock(50.0))
    step()
    step()
    assert said == ["copying 1 of 1", "copying 2"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (7500, "2 h 5 min")]
)
def test_a_time_to_wait_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_items_are_counted_as_they_are_taken() -> None:
    said: list[str] = []
    assert list(counted(["a", "b"], said.append, "rewriting")) == ["a", "b"]
    assert list(counted((c for c in "c"), said.append, "of a generator")) == ["c"]
    batches = Announced([1, 2], said.append, "recalibrate-bn")
    assert list(batches) == [1, 2]
    assert said[:2] == ["rewriting 1 of 2", "rewriting 2 of 2"]
    assert said[2] == "of a generator 1"
    assert said[3:] == [
        "recalibrate-bn: calibration batch 1 of 2",
        "recalibrate-bn: calibration batch 2 of 2",
        "recalibrate-bn",
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    return models.randomize_norms_(nn.Sequential(*layers)).eval()


def test_a_verification_counts_every_input_that_it_judges() -> None:
    said: list[str] = []
    model, x = network(), torch.randn(2, 3, 8, 8)
    folded = rewrite.convert(model, "fold", example_inputs=x).model
    found = rewrite.verify(model, folded, x, progress=said.append)
    assert found.ok and len(said) > 3
    total = len(said)
    for number, line in enumerate(said, start=1):
        assert f"{number} of {total}" in line
    said.clear()
    rewrite.verify(model, folded, x, level="quick", progress=said.append)
    assert len(said) == 2 and "2 of 2" in said[1]


def test_a_signal_counts_layers_and_a_conversion_says_both_of_its_parts() -> None:
    said: list[str] = []
    model, x = network(), torch.randn(2, 3, 8, 8)
    rewrite.signal(model, x, progress=said.append)
    assert said == ["singular values of layer 1 of 2", "singular values of layer 2 of 2"]
    said.clear()
    rewrite.convert(model, "fold", example_inputs=x, progress=said.append)
    assert said[0] == "fold" and "verifying fold" in said
    assert any(line.startswith("verifying: given") for line in said)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_step_and_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rewrite.progress._PATIENCE", 0.01)
    with ProgressLine() as progress:
        assert _comes(screen, "starting …")
        progress("verifying [1] 3 of 4")
        assert _comes(screen, "verifying [1] 3 of 4 …")
    assert "0:00:0" in screen.getvalue()


def _comes(screen: Terminal, text: str) -> bool:
    """Wait until a thread has written a text, for ten seconds at most; say whether it has."""
    end = time.monotonic() + 10
    while text not in screen.getvalue() and time.monotonic() < end:
        time.sleep(0.005)
    return text in screen.getvalue()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_shown_where_there_is_no_terminal_or_it_is_not_wanted(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO() if enabled else Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("rewrite.progress._PATIENCE", 0.01)
    with ProgressLine(enabled=enabled) as progress:
        progress("verifying")
        time.sleep(0.2)
    assert screen.getvalue() == ""
