"""Lines that no observed call took, between a norm and what reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable
from tests.observe.folding import folded, reason, targets


class Raw(nn.Module):
    """An argument that no example call gives chooses what else reads the value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head, self.other = RMSNorm(), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.post_norm = False

    @untraceable
    def forward(self, x: Tensor, raw: bool = False, **kwargs: Any) -> Tensor:
        if self.post_norm:
            x = self.norm(x * 2)
        h = self.norm(x)
        if self.kind == "reads" and raw:
            return h * 2
        y = self.head(h)
        if self.kind == "overwritten" and raw:
            h = y
            return h * 3
        if self.kind == "calls" and raw:
            return self.head(x)
        return y


@pytest.mark.parametrize(
    ("kind", "folds"), [("reads", False), ("calls", False), ("overwritten", True)]
)
def test_a_line_that_no_call_took_counts(kind: str, folds: bool) -> None:
    result = folded(randomized(Raw(kind)), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"norm"} if folds else set())
    if not folds:
        assert "test_check.py:" in reason(result, "norm") and "no call took it" in reason(
            result, "norm"
        )


class Chosen(nn.Module):
    """One of several layers, by a key that the calls leave alone."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.heads = nn.ModuleDict({key: nn.Linear(WIDTH, 4) for key in keys})
        self.key = "a"

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.heads[self.key](self.norm(x))


@pytest.mark.parametrize(("keys", "folds"), [(["a"], True), (["a", "b"], False)])
def test_a_layer_that_no_call_chose_counts(keys: list[str], folds: bool) -> None:
    result = folded(randomized(Chosen(keys)), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"norm"} if folds else set())
    if not folds:
        assert "heads also holds b" in reason(result, "norm")
