"""Gains of activations: exact or measured."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional

from rewrite.init.gains import gain


@pytest.mark.parametrize("name", ["linear", "relu", "tanh", "sigmoid", "selu"])
def test_gain_of_torch(name):
    assert gain(name) == pytest.approx(nn.init.calculate_gain(name), rel=1e-12)
    slope = nn.init.calculate_gain("leaky_relu", 0.3)
    assert gain("leaky_relu", 0.3) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("name", ["gelu", "silu", "elu", "hardswish", "mish", "softsign"])
def test_gain_keeps_the_second_moment(name):
    function = getattr(functional, name)
    moment, _ = integrate.quad(
        lambda z: function(torch.tensor(z)).item() ** 2 * stats.norm.pdf(z), -9, 9, limit=200
    )
    # The quadrature of a function with a kink is good to about 1e-4.
    assert gain(name) == pytest.approx(1 / math.sqrt(moment), rel=3e-4)
