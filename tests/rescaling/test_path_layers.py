"""Layers with weights: the sum over the paths that end in their units."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rewrite.rescaling.path_norm import path_norms
from tests.rescaling.paths import ORDERS, agree, conv, random_chain

geometry = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 2),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 1),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


def transposed(options: dict[str, int]) -> nn.Module:
    options = {**options, "padding": min(options["padding"], options["kernel_size"] - 1)}
    return nn.ConvTranspose2d(2, 2, output_padding=options["stride"] - 1, **options)


@given(options=geometry, up=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_sum_over_all_paths_through_convolutions(
    options: dict[str, int], up: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    first = conv({**options, "padding": 1})
    second = (transposed if up else conv)({**options, "stride": 1, "padding": 1})
    agree(random_chain([first, nn.ReLU(), second], seed), (2, 3, 3))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    kinds = {1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d), 3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d)}
    conv_, max_, mean_ = kinds[dims]
    agree(
        random_chain([conv_(1, 2, 2), max_(2, 1), mean_(2, 1)]),
        (1, *(4,) * dims),
        (1, 2, math.inf) if dims == 1 else (2,),
    )


def test_padding_modes_are_padding_and_then_the_convolution() -> None:
    torch.manual_seed(0)
    inside = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    outside = nn.Conv2d(2, 2, 3)
    outside.load_state_dict(inside.state_dict())
    x = torch.zeros(1, 2, 4, 4)
    one = path_norms(nn.Sequential(inside, nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False)), ORDERS, x)
    torch.manual_seed(0)
    two = nn.Sequential(nn.ReflectionPad2d(1), outside, nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
    assert path_norms(two, ORDERS, x).keys() == one.keys()
    assert path_norms(inside, ORDERS, x) == path_norms(nn.Sequential(*two[:2]), ORDERS, x)
