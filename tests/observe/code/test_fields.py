"""Reductions between norm and reader, and code that hands a value on in tuples and objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable


def folded(model: nn.Module, *shape: int) -> Any:
    x = torch.randn(*shape, WIDTH, dtype=torch.float64)
    return rewrite.convert(randomized(model), "fold", example_inputs=(x,))


def targets(result: Any) -> set[str]:
    return {change.target for change in result.report.changes}


class Pooled(nn.Module):
    """A norm, something along the tokens, and a head."""

    def __init__(self, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.norm, self.head, self.kind = norm, nn.Linear(WIDTH, 4), kind

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        if self.kind == "mean":
            h = h.mean(1)
        elif self.kind == "sum":
            h = h.sum(dim=1)
        elif self.kind == "pool":
            h = torch.flatten(F.adaptive_avg_pool1d(h.transpose(1, 2), 1), 1)
        elif self.kind == "pad":
            h = F.pad(h, (0, 0, 0, 2))
        elif self.kind == "channels":
            h = h.mean(-1, keepdim=True).expand(h.shape)
        return self.head(h)


@pytest.mark.parametrize(
    ("kind", "scales", "shifts"),
    [
        ("mean", True, True), ("pool", True, True), ("sum", True, False), ("pad", True, False),
        ("channels", False, False),
    ],
)  # fmt: skip
def test_what_passes_a_reduction(kind: str, scales: bool, shifts: bool) -> None:
    assert targets(folded(Pooled(RMSNorm(), kind), 2, 3)) == ({"norm"} if scales else set())
    layer_norm = folded(Pooled(nn.LayerNorm(WIDTH), kind), 2, 3)
    assert targets(layer_norm) == ({"norm"} if shifts else set())


@dataclass
class Output:
    first: Tensor
    second: Tensor


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
    result = folded(Handed(kind), 2, 3)
    assert targets(result) == ({"norm"} if folds else set())


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
    assert targets(folded(Summed(kind), 2, 3)) == ({"norm"} if folds else set())


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
    assert targets(folded(kind(), 2, 3)) == ({"norm"} if folds else set())
