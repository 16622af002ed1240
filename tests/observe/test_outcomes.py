"""Folds from observed calls: right where they are made, and refused with the true reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.observe.blocks import WIDTH, Decoder, RMSNorm, randomized, untraceable
from tests.observe.folding import folded, targets


def test_the_argument_is_untouched() -> None:
    model = randomized(Decoder(tied=True))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded(model, untie=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.head.weight is model.embed.weight


class Fields(nn.Module):
    """A value in one field of an object; code that no call took reads another, or this one."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field
        self.inner, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    def body(self, x: Tensor) -> Output:
        return Output(first=self.inner(x), second=x * 2)

    @untraceable
    def forward(self, x: Tensor, loss: bool = False, **kwargs: Any) -> Tensor:
        output: Output = self.body(x)
        y = self.head(output.first)
        if loss and self.field == "first":
            y = y + output.first.sum()
        if loss and self.field == "second":
            y = y + output.second.sum()
        return y


class Output:
    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


@pytest.mark.parametrize(("field", "folds"), [("first", False), ("second", True)])
def test_the_fields_of_an_object_are_told_apart(field: str, folds: bool) -> None:
    result = folded(randomized(Fields(field)), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"inner"} if folds else set())


class Nested(nn.Module):
    """What reads the norm is called on the line of the norm itself, and may do something else."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.head = norm(), nn.Linear(WIDTH, 3)

    @untraceable
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.norm(x), mask)

    def finish(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return self.head(h)


class NestedMasked(Nested):
    def finish(self, h: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            h = h * mask + 1
        return self.head(h)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH)])
def test_a_function_called_on_the_line_of_the_norm_is_read(norm: Any) -> None:
    inputs = (torch.randn(2, 4, WIDTH, dtype=torch.float64),)
    assert targets(folded(randomized(Nested(norm)), inputs)) == {"norm"}
    assert not targets(folded(randomized(NestedMasked(norm)), inputs))
