"""Calls of native code: a deadline, too much memory and Ctrl-C end the wait."""

from __future__ import annotations

import _thread
import threading

import numpy as np
import pytest

from rewrite.onnx.vetting import worker
from rewrite.onnx.vetting.worker import EndlessError, call, deadline


def test_a_call_returns_what_the_function_does() -> None:
    assert call(lambda: 3, 60, "it", "wait") == 3


def test_an_error_of_the_function_comes_through() -> None:
    def fails() -> None:
        raise KeyError("a")

    with pytest.raises(KeyError, match="a"):
        call(fails, 60, "it", "wait")


def test_a_call_that_does_not_end_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(EndlessError, match=r"^net: did not end within 0 s and was stopped; look"):
        call(lambda: never.wait(600), 0.1, "net:", "look")
    never.set()


def test_an_interrupt_ends_the_wait() -> None:
    never = threading.Event()

    def interrupted() -> None:
        _thread.interrupt_main()
        never.wait(600)

    with pytest.raises(KeyboardInterrupt):
        call(interrupted, 600, "net:", "look")
    never.set()


def test_a_call_that_takes_too_much_memory_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(worker, "LEAST_BYTES", 8 << 20)
    monkeypatch.setattr(worker, "free_memory", lambda: 0)
    never = threading.Event()

    def takes() -> None:
        held = np.ones(64 << 20, np.uint8)
        never.wait(600)
        assert held[0]

    with pytest.raises(EndlessError, match=r"^net: took 0\.\d GiB of memory, where 0.0 GiB"):
        call(takes, 600, "net:", "look")
    never.set()


def test_a_larger_graph_may_take_longer() -> None:
    assert deadline(0) == 60
    assert deadline(500_000_000) == 560
