"""Methods that are given the value, or return it, or another one in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes import FoldNorm
from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable
from tests.observe.code.chooses import check
from tests.observe.folding import folded, targets


def from_a_method(self: Any, x: Tensor, flag: int = 0) -> Any:
    return self.head(self.features(x, flag))


def into_a_method(self: Any, x: Tensor, flag: int = 0) -> Any:
    return self.finish(self.norm(self.embed(x)), self.other(x) if flag else None)


@pytest.mark.parametrize("forward", [from_a_method, into_a_method], ids=lambda f: f.__name__)
def test_a_method_that_may_hand_on_another_value_is_not_folded_into(forward: Any) -> None:
    check(forward, FoldNorm(), nn.LayerNorm(16))


class Handed(nn.Module):
    """Code that no call took reads one place of what a method returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    def both(self, x: Tensor) -> Any:
        h = self.norm(x)
        if self.kind == "stacked":
            return torch.stack((h, x))
        return h, x * 2

    @untraceable
    def forward(self, x: Tensor, extra: bool = False, **kwargs: Any) -> Any:
        h, other = self.both(x)
        if extra and self.kind in ("second", "stacked"):
            return other * 3
        if extra and self.kind == "first":
            return h * 3
        if self.kind == "looped":
            for _, other in [self.both(x)]:
                if extra:
                    return other * 3
        if self.kind == "again" and extra:
            found = self.both(x)
            return found[1] * 3
        return self.head(h)


@pytest.mark.parametrize(
    ("kind", "folds"),
    [("second", True), ("first", False), ("stacked", False), ("looped", False), ("again", False)],
)
def test_the_places_of_a_tuple_are_told_apart(kind: str, folds: bool) -> None:
    result = folded(randomized(Handed(kind)), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"norm"} if folds else set())
