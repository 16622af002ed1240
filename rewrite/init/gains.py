"""Gains of activations: the factor that keeps the second moment, exact or measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch.nn import functional

from rewrite.errors import OptionError

# -- gains ---------------------------------------------------------------------------------------

_EXACT_GAINS = {
    # What torch.nn.init.calculate_gain says, for the activations that it knows.
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 0.75,
}


_MEASURED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "celu": functional.celu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": functional.hardswish,
    "hardtanh": functional.hardtanh,
    "mish": functional.mish,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "softsign": functional.softsign,
}


_ALIASES = {"identity": "linear", "none": "linear", "swish": "silu", "hard_swish": "hardswish"}


def activation_names() -> tuple[str, ...]:
    """Return the activations whose gain is known."""
    return tuple(sorted({*_EXACT_GAINS, *_MEASURED, "leaky_relu"}))


def gain(activation: str, negative_slope: float = 0.01) -> float:
    """Return the factor on a layer's standard deviation that makes up for `activation`.

    PyTorch's value where `torch.nn.init.calculate_gain` has one; otherwise 1 / sqrt(E f(z)^2) for z
    standard normal, by Gauss-Hermite quadrature, which is the principle behind He's sqrt(2).

    Raises:
        OptionError: the activation is not known.
    """
    name = _ALIASES.get(activation, activation)
    if name == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + negative_slope**2))
    if name in _EXACT_GAINS:
        return _EXACT_GAINS[name]
    if name in _MEASURED:
        return _second_moment_gain(name)
    raise OptionError(
        f"unknown activation {activation!r}; known are {', '.join(activation_names())}"
    )


@cache
def _second_moment_gain(name: str) -> float:
    nodes, weights = hermegauss(180)
    values = _MEASURED[name](torch.from_numpy(nodes)).numpy()
    return float(1.0 / math.sqrt((weights * values**2).sum() / weights.sum()))
