"""Calls of native code: a deadline, too much memory and Ctrl-C end the wait."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading

import numpy as np
import pytest

from rewrite.onnx.vetting import worker
from rewrite.onnx.vetting.worker import EndlessError, Limits, call, deadline


def test_a_call_returns_what_the_function_does() -> None:
    assert call(lambda: 3, Limits(60), "it", "wait") == 3


def test_an_error_of_the_function_comes_through() -> None:
    def fails() -> None:
        raise KeyError("a")

    with pytest.raises(KeyError, match="a"):
        call(fails, Limits(60), "it", "wait")


def test_a_call_that_does_not_end_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    never = threading.Event()
    with pytest.raises(EndlessError, match=r"^net: did not end within 0 s and was stopped; look"):
        call(lambda: never.wait(600), Limits(0.1), "net:", "look")
    never.set()


def test_an_interrupt_ends_the_wait() -> None:
    never = threading.Event()

    def interrupted() -> None:
        _thread.interrupt_main()
        never.wait(600)

    with pytest.raises(KeyboardInterrupt):
        call(interrupted, Limits(600), "net:", "look")
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
        call(takes, Limits(600), "net:", "look")
    never.set()


def test_a_larger_graph_may_take_longer() -> None:
    assert deadline(0) == 60
    assert deadline(500_000_000) == 560


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("Failed to allocate memory for requested buffer")]
)
def test_what_the_system_refuses_is_too_much_memory(error) -> None:
    def refused() -> None:
        raise error

    with pytest.raises(EndlessError, match="asked for too much memory at once"):
        call(refused, Limits(60), "net:", "look")


def test_what_can_be_told_to_stop_is_told_and_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.0)
    told, left = threading.Event(), threading.Event()

    def until_told() -> None:
        told.wait(600)
        left.set()

    with pytest.raises(EndlessError, match="did not end"):
        call(until_told, Limits(0.05), "net:", "look", told.set)
    assert left.is_set()


def test_a_call_that_waits_for_the_processor_is_waited_for(monkeypatch) -> None:
    """Other programs have it: only the time that it worked counts, up to a minute more."""
    monkeypatch.setattr(worker.time, "process_time", lambda: 0.0)
    assert call(lambda: threading.Event().wait(0.3), Limits(0.01), "net:", "look") is False


def test_far_more_memory_than_may_be_taken_is_refused_by_the_system() -> None:
    """In a process of its own, since other threads are left alone."""
    code = (
        "import numpy as np\n"
        "from rewrite.onnx.vetting.worker import EndlessError, Limits, call\n"
        "try: call(lambda: np.ones(1 << 31, np.uint8), Limits(60, 64 << 20), 'net:', 'look')\n"
        "except EndlessError as error: print(error)\n"
        "print(np.ones(1 << 28, np.uint8).size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith(("net: asked for too much memory at once", "net: took"))
    assert second == str(1 << 28)
