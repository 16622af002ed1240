"""Records of a trace: a place is equal by value, what holds nodes by identity."""

from __future__ import annotations

import pytest
from torch.fx import Graph

from rewrite.tracing.records import BY_SIZE, Decision, Frame, Opaque, Trace


def test_two_invocations_of_a_module_are_two_frames() -> None:
    assert Frame("a", 0) == Frame("a", 0) != Frame("a", 1)
    assert len({Frame("a", 0), Frame("a", 0), Frame("b", 0)}) == 2


def test_an_opaque_module_is_equal_by_its_reason_and_line() -> None:
    assert Opaque("a", "why", None) == Opaque("a", "why", None) != Opaque("a", "why", "f.py:1")


def test_decisions_are_told_apart_even_at_one_line() -> None:
    code = test_two_invocations_of_a_module_are_two_frames.__code__
    one, other = Decision("a", code, 1, []), Decision("a", code, 1, [])
    assert one != other and len({one, other}) == 2
    assert one.when == BY_SIZE and one.held is not other.held
    with pytest.raises(AttributeError):
        one.line = 2  # type: ignore[misc]  # the record is frozen


def test_two_traces_share_no_container() -> None:
    one, other = Trace(Graph()), Trace(Graph())
    for name in ("frames", "lines", "constants", "entered", "kept", "decisions", "augmented"):
        assert getattr(one, name) is not getattr(other, name), name
