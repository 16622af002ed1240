"""Residual-aware initialization of the branches that the graph shows."""

import math

import pytest
import torch
from torch import nn

from passes import Reinitialize
from rewrite.pipeline import convert
from tests.passes.test_reinit import reinit


def blocks(count: int, norm: bool) -> nn.Sequential:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4) if norm else nn.Identity()

        def forward(self, x):
            return x + self.norm(self.two(self.one(x).relu()))

    return nn.Sequential(*[Block() for _ in range(count)])


@pytest.mark.parametrize("norm", [False, True])
def test_depth_scaling(norm):
    plain = reinit(blocks(8, norm)).model
    scaled = reinit(blocks(8, norm), residual="depth").model
    for one, two in zip(plain, scaled, strict=True):
        last, other = (one.norm, two.norm) if norm else (one.two, two.two)
        torch.testing.assert_close(other.weight, last.weight / math.sqrt(8))
        assert torch.equal(one.one.weight, two.one.weight)


def test_fixup():
    plain = reinit(blocks(8, False)).model
    fixed = reinit(blocks(8, False), residual="fixup").model
    for one, two in zip(plain, fixed, strict=True):
        torch.testing.assert_close(two.one.weight, one.one.weight * 8 ** (-1 / 2))
        assert not two.two.weight.any()


def test_residual_zeros_respect_the_selection():
    result = convert(blocks(2, True), [Reinitialize(residual="zero")], only=["0.*"], verify=False)
    assert not result.model[0].norm.weight.any()
    assert result.model[1].norm.weight.all()
