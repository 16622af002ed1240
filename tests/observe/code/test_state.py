"""What is known behind a fork is what either way leaves: the value, another one, or both."""

from __future__ import annotations

from rewrite.observe.code.state import Other, State, behind, either

MODEL, CALLER = Other("model.py:3"), Other("model.py:1", given="hidden")


def test_behind_a_fork_a_name_may_hold_what_either_way_left() -> None:
    taken = State({"h"}, known={"flag": 1, "size": 2}, others={})
    other = State(set(), known={"flag": 0, "size": 2}, others={"h": MODEL})
    both = behind([taken, other])
    assert both.names == {"h"} and both.others == {"h": MODEL}
    assert both.known == {"size": 2}  # what only one way knows is not known


def test_a_copy_is_changed_alone() -> None:
    state = State({"h"}, known={"flag": 1})
    copy = state.copy()
    copy.names.add("y")
    copy.known.clear()
    assert state.names == {"h"} and state.known == {"flag": 1}


def test_a_value_of_the_code_comes_before_what_a_caller_gives() -> None:
    assert either(None, CALLER, MODEL) == MODEL
    assert either(None, CALLER) == CALLER
    assert either(None) is None


def test_that_it_may_be_none_is_kept_with_what_a_caller_gives() -> None:
    nothing = Other("model.py:2", nothing=True)
    found = either(nothing, CALLER)
    assert found is not None and found.given == "hidden" and found.nothing
    assert not nothing.is_value and not CALLER.is_value and MODEL.is_value
