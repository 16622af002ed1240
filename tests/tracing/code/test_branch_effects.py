"""rewrite.tracing.code.branch_effects: what other code may call, and which has run by a line."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from rewrite.tracing.code.branch_effects import UNKNOWN, BranchEffects, line_of, spell, until


def straight(x: Any, raw: bool) -> Any:
    y = x if raw else -x
    return y + 1


def looped(x: Any, raw: bool) -> Any:
    for _ in range(2):
        x = x if raw else -x
    return x


def deferred(x: Any, raw: bool) -> Any:
    later = lambda: x if raw else -x  # noqa: E731 - what is tried
    return later()


def effects(function: Any, line: int) -> BranchEffects:
    made = BranchEffects({"raw": None}, set(), set())
    until(made, (function.__code__, function.__code__.co_firstlineno + line))
    return made


@pytest.mark.parametrize(
    ("function", "over"), [(straight, True), (looped, False), (deferred, False)]
)
def test_code_is_over_on_a_later_line_of_a_function_that_runs_in_order(
    function: Any, over: bool
) -> None:
    code = function.__code__
    first = code.co_firstlineno
    assert effects(function, 1).is_over(code, first + 2) is over
    assert not effects(function, 1).is_over(code, first + 1)  # on its own line
    assert not effects(function, 1).is_over((lambda: 0).__code__, first + 9)


def test_code_that_is_called_from_elsewhere_is_never_over() -> None:
    made = effects(straight, 1)
    until(made, UNKNOWN)
    assert not made.is_over(straight.__code__, 10**6)
    assert not BranchEffects({}, set(), set()).is_over(straight.__code__, 10**6)


def test_the_line_of_a_part_is_its_last_and_no_part_has_none() -> None:
    part = ast.parse("def straight():\n    return (1,\n        2)").body[0].body[0]
    assert line_of(straight, part) == (straight.__code__, straight.__code__.co_firstlineno + 2)
    assert line_of(straight, None) == UNKNOWN


def test_what_code_calls_and_mentions() -> None:
    made = BranchEffects({}, set(), set())
    spell(ast.parse("self.conv(self.bn)"), made)
    assert made.may_call("block.conv") and made.may_call("bn.0") and not made.may_call("conv.0")
