"""The function of the old norm in terms of the new one's input, and how many groups fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.grouping.swapped_norm import SwappedNorm, largest_divisor


@pytest.mark.parametrize(
    ("module", "shape", "groups"),
    [
        (nn.GroupNorm(2, 4), (3, 4, 5, 5), 2),
        (nn.InstanceNorm2d(4), (3, 4, 5, 5), 4),
        (nn.LayerNorm(4), (3, 5, 4), 1),
    ],
)
def test_the_old_function_is_scale_and_bias_along_the_channels(
    module: nn.Module, shape: tuple[int, ...], groups: int
) -> None:
    scale, bias = torch.randn(2, 4, dtype=torch.float64)
    norm = SwappedNorm("norm", module, scale, bias)
    z = torch.randn(shape, dtype=torch.float64)
    last = isinstance(module, nn.LayerNorm)
    want = z * scale + bias if last else z * scale[:, None, None] + bias[:, None, None]
    assert (norm.old(z) - want).abs().max() < 1e-13
    assert (norm.old(z) - z * scale.mean()).abs().max() > 1e-3
    assert norm.groups == groups
    assert norm.means(z).shape == ((15, 4) if last else (3, 4))


def test_an_old_function_that_is_more_is_asked_itself() -> None:
    norm = SwappedNorm("n", nn.GroupNorm(1, 2), torch.ones(2), torch.zeros(2), exact=nn.ReLU())
    z = torch.tensor([[-1.0, 2.0]])
    assert torch.equal(norm.old(z), torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize(
    ("number", "limit", "found"), [(48, 32, 24), (7, 4, 1), (8, 8, 8), (6, 9, 6)]
)
def test_the_largest_divisor_that_fits(number: int, limit: int, found: int) -> None:
    assert largest_divisor(number, limit) == found
