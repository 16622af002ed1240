"""What the code of a class multiplies with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewrite.tracing.code.products import sums_over, writes_product

PRODUCTS = frozenset({"matmul", "linear", "einsum"})


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            turned = self.turned.t()
            x = x @ turned + self.shift
        x = F.linear(self.given, self.weight, self.bias) * self.scale
        return torch.einsum("ni,i,io->no", x, self.gain, self.out)


class Derived(Layer):
    """Its own forward multiplies nothing; that of its base does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.own


@pytest.mark.parametrize("kind", [Layer, Derived])
def test_factors_of_products(kind: type[nn.Module]) -> None:
    keys = ("turned", "shift", "given", "weight", "bias", "scale", "gain", "out", "own")
    found = {key for key in keys if writes_product(kind, key, PRODUCTS)}
    assert found == {"turned", "weight", "gain", "out"}
    assert not writes_product(kind, "weight", frozenset({"matmul"}))


def test_a_class_without_source() -> None:
    assert not writes_product(type("Made", (nn.Module,), {}), "weight", PRODUCTS)


@pytest.mark.parametrize(
    ("equation", "place", "sums"),
    [
        ("ni,io->no", 1, True),
        ("ni, i -> ni", 1, False),
        ("...d,...d->...", 1, True),
        ("bhid,hd->bhid", 1, False),
        ("ni,io", 1, True),  # the output is implied: what occurs once
        ("ni,ok->no", 1, False),  # k is summed alone: no product
        ("ij,kl", 1, False),
    ],
)
def test_an_equation_sums_or_scales(equation: str, place: int, sums: bool) -> None:
    assert sums_over(equation, place) is sums
