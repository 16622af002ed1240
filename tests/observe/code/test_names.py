"""Names that hold the value or another one: bound to it, in tuples, under keys, at places."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from passes import FoldNorm
from tests.observe.code.chooses import check


def by_another_name(self: Any, x: Tensor, flag: int = 0) -> Any:
    y = self.other(x)
    h = self.norm(self.embed(x))
    if flag:
        h = y
    return self.head(h) + 0 * y.sum()


def in_a_tuple(self: Any, x: Tensor, flag: int = 0) -> Any:
    h, y = self.norm(self.embed(x)), x
    if flag:
        h, y = self.other(x), x
    return self.head(h) + 0 * y.sum()


def under_a_key(self: Any, x: Tensor, flag: int = 0) -> Any:
    held = {"h": self.norm(self.embed(x))}
    if flag:
        held.update(h=self.other(x))
    return self.head(held["h"])


def at_a_place(self: Any, x: Tensor, flag: int = 0) -> Any:
    held = [self.norm(self.embed(x)), self.other(x)]
    return self.head(held[flag])


@pytest.mark.parametrize(
    "forward", [by_another_name, in_a_tuple, under_a_key, at_a_place], ids=lambda f: f.__name__
)
def test_a_name_that_may_hold_another_value_is_not_folded_into(forward: Any) -> None:
    check(forward, FoldNorm(), nn.LayerNorm(16))
