"""Another value on a way through a branch, a loop, a handler or a case."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from passes import FoldNorm
from tests.observe.code.chooses import check


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


@pytest.mark.parametrize(
    "forward",
    [
        behind_a_branch,
        in_the_other_branch,
        before,
        where_nothing_was,
        in_a_handler,
        in_a_loop,
        in_a_case,
    ],
    ids=lambda f: f.__name__,
)
def test_a_reader_behind_a_fork_that_another_value_may_feed_is_not_folded_into(
    forward: Any,
) -> None:
    check(forward, FoldNorm(), nn.LayerNorm(16))
