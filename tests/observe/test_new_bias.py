"""A bias that a layer did not have: taken up where its class adds it to the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from rewrite.observe.new_bias import adds_new_bias

from .blocks import randomized, untraceable


class Plain(nn.Linear):
    """As `nn.Linear`."""


class Written(nn.Linear):
    """Falcon's: the product written out, and the bias added if there is one."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Goes(nn.Linear):
    """A router's: it goes on with the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Ignores(nn.Linear):
    """It adds no bias, whatever it has."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Twice(Written):
    """It adds half of it, twice in two places."""

    def forward(self, x: Tensor) -> Tensor:
        product = super().forward(x)
        return product if self.bias is None else product + self.bias


class Scales(nn.Linear):
    """It multiplies the sum of another value and its bias."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product * 2 + self.bias


class Reads(nn.Linear):
    """The product goes another way as well."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else (product + self.bias) * product.sigmoid()


class Negates(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product - self.bias


class Broadcasts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias[:1]


class Fails(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            raise ValueError("no bias, please")
        return x @ self.weight.T


ADDS = [Plain, Written, Goes]
OTHERS = [Ignores, Twice, Scales, Reads, Negates, Broadcasts, Fails]


class Model(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.norm, self.read, self.head = nn.LayerNorm(8), kind(8, 6, bias=False), nn.Linear(6, 3)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.head(torch.tanh(self.read(self.norm(x))))


@pytest.mark.parametrize("kind", [*ADDS, *OTHERS])
def test_a_shift_becomes_a_bias_where_the_class_adds_it(kind: Any) -> None:
    layer = kind(8, 6, bias=False).double()
    assert adds_new_bias(layer, (2, 5, 8)) is (kind in ADDS)
    assert layer.bias is None
    model = randomized(Model(kind))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=(x,))
    assert result.report.ok
    if kind in ADDS:
        assert [change.target for change in result.report.changes] == ["norm"]
        assert (model(x) - result.model(x)).abs().max() < 1e-12
        assert type(result.model.read) is kind and bool(result.model.read.bias.any())
    else:
        assert not result.report.changes
        (skip,) = result.report.skips
        assert skip.reason == "read has no bias to absorb a shift, and cannot be given one"


def test_a_layer_that_has_a_bias_gets_no_new_one() -> None:
    assert not adds_new_bias(Plain(8, 6), (2, 8))
    assert not adds_new_bias(nn.Conv1d(8, 6, 1, bias=False), (2, 8, 4))
