"""Another value inside of an expression, and what an expression makes of the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes import FoldNorm
from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable
from tests.observe.code.chooses import check
from tests.observe.folding import folded, targets


def in_an_expression(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.other(x) if flag else self.norm(self.embed(x))
    return self.head(h)


def in_a_test(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag and (h := self.other(x)) is not None:
        pass
    return self.head(h)


@pytest.mark.parametrize("forward", [in_an_expression, in_a_test], ids=lambda f: f.__name__)
def test_an_expression_that_chooses_another_value_is_not_folded_into(forward: Any) -> None:
    check(forward, FoldNorm(), nn.LayerNorm(16))


@dataclass
class Output:
    first: Tensor
    second: Tensor


class Summed(nn.Module):
    """Lists of outputs are added, or values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Any:
        h = self.norm(x)
        if self.kind == "value":
            return h
        return Output(first=h, second=x * 2)

    @untraceable
    def forward(self, x: Tensor, plain: bool = False, **kwargs: Any) -> Any:
        output = self.body(x)
        if plain:
            return output + (x,)[0:]
        return self.head(output if self.kind == "value" else output.first)


@pytest.mark.parametrize(("kind", "folds"), [("object", True), ("value", False)])
def test_a_sum_of_collections_computes_nothing(kind: str, folds: bool) -> None:
    assert targets(
        folded(randomized(Summed(kind)), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    ) == ({"norm"} if folds else set())


class Inline(nn.Module):
    """The reader is called around the norm, in one expression; the logits are read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, WIDTH)

    @untraceable
    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        logits = self.head(self.norm(x))
        if labels is not None:
            logits = logits - labels
        return logits


class Beside(Inline):
    """The norm's output is a value of its own, and read elsewhere."""

    @untraceable
    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        hidden = self.norm(x)
        if labels is not None:
            hidden = hidden - labels
        return self.head(hidden)


@pytest.mark.parametrize(("kind", "folds"), [(Inline, True), (Beside, False)])
def test_what_a_layer_returns_is_not_the_value(kind: type[Inline], folds: bool) -> None:
    assert targets(
        folded(randomized(kind()), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    ) == ({"norm"} if folds else set())
