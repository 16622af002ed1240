"""Initialization schemes as formulas of fans, layout and gain.

    glorot (xavier)   Var w = gain^2 * 2 / (fan_in + fan_out)
    he (kaiming)      Var w = gain^2 / fan          fan = fan_in, or fan_out on request
    lecun             Var w = gain^2 / fan_in
    standard          w ~ U[-1/sqrt(fan_in), 1/sqrt(fan_in)]      (PyTorch's own default)
    orthogonal        W W^T = gain^2 I  (or W^T W, whichever is smaller), each group by itself
    dirac             output channel o copies input channel o, each group by itself
    trunc_normal      N(0, std^2) cut at -2 and 2, std = 0.02     (timm's convention for ViT)
    normal, zeros

Every scheme fills the `units` of a `Layout`, so that a grouped, transposed or packed weight gets
what its dense, upright form would get. Draws are made on the CPU in float64 from a generator seeded
by the name of the weight: they depend neither on the device nor on the other layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import nn
from torch.nn import functional

from rewrite.errors import OptionError
from rewrite.fans import LinearMap

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


# -- schemes -------------------------------------------------------------------------------------

MODES = ("fan_in", "fan_out", "fan_avg")

_DISTRIBUTIONS = ("uniform", "normal")

# name -> (family, distribution)
_SCHEMES = {
    "glorot": ("glorot", "uniform"),
    "glorot_uniform": ("glorot", "uniform"),
    "glorot_normal": ("glorot", "normal"),
    "xavier": ("glorot", "uniform"),
    "xavier_uniform": ("glorot", "uniform"),
    "xavier_normal": ("glorot", "normal"),
    "he": ("he", "normal"),
    "he_normal": ("he", "normal"),
    "he_uniform": ("he", "uniform"),
    "kaiming": ("he", "normal"),
    "kaiming_normal": ("he", "normal"),
    "kaiming_uniform": ("he", "uniform"),
    "lecun": ("lecun", "normal"),
    "lecun_normal": ("lecun", "normal"),
    "lecun_uniform": ("lecun", "uniform"),
    "standard": ("standard", "uniform"),
    "orthogonal": ("orthogonal", ""),
    "dirac": ("dirac", ""),
    "trunc_normal": ("trunc_normal", ""),
    "normal": ("normal", ""),
    "zeros": ("zeros", ""),
}

_DEFAULT_MODE = {"glorot": "fan_avg", "he": "fan_in", "lecun": "fan_in", "standard": "fan_in"}
_SHAPE_FREE = ("trunc_normal", "normal", "zeros")


def scheme_names() -> tuple[str, ...]:
    """Return the names of the schemes."""
    return tuple(_SCHEMES)


@dataclass(frozen=True)
class Scheme:
    """An initialization: a family, a distribution, and what was said beside the name.

    `activation` is the one that the gain makes up for (None: the one that follows in the graph
    for `he`, none for the others); `number` is a standard deviation for `normal` and
    `trunc_normal`, and a gain for the rest.
    """

    family: str
    distribution: str = ""
    mode: str = ""
    activation: str | None = None
    number: float | None = None

    @property
    def needs_fans(self) -> bool:
        """Whether the scheme is only defined for a linear map."""
        return self.family not in _SHAPE_FREE

    @property
    def follows_graph(self) -> bool:
        """Whether the gain is that of the activation that follows in the graph."""
        return self.family == "he" and self.activation is None and self.number is None

    def gain(self, following: float = 1.0) -> float:
        """Return the gain, given that of the activation that follows in the graph."""
        if self.number is not None and self.needs_fans:
            return self.number
        if self.activation is not None:
            return gain(*_activation(self.activation))
        return following if self.follows_graph else 1.0

    def std(self, fan_in: float, fan_out: float, following: float = 1.0) -> float:
        """Return the standard deviation of a weight with these fans."""
        if self.family in ("normal", "trunc_normal"):
            return 0.02 if self.number is None else self.number
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        scale = math.sqrt(1.0 / 3.0) if self.family == "standard" else self.gain(following)
        return scale / math.sqrt(fan)


def _activation(text: str) -> tuple[str, float]:
    name, _, slope = text.partition("=")
    return name, float(slope) if slope else 0.01


def parse_scheme(text: str) -> Scheme:
    """Read a scheme: a name, then `:`-separated mode, activation, distribution or number.

    `he`, `he:fan_out`, `he:fan_out:leaky_relu=0.2`, `glorot:normal`, `trunc_normal:0.01`,
    `orthogonal:1.4`.

    Raises:
        OptionError: a part is not known; the message lists what is.
    """
    name, *options = text.strip().split(":")
    if name not in _SCHEMES:
        raise OptionError(f"unknown scheme {name!r}; known are {', '.join(scheme_names())}")
    family, distribution = _SCHEMES[name]
    scheme = Scheme(family, distribution, _DEFAULT_MODE.get(family, ""))
    for option in options:
        scheme = _with_option(scheme, name, option)
    return scheme


def _with_option(scheme: Scheme, name: str, option: str) -> Scheme:
    if option in MODES:
        if not scheme.mode or scheme.family == "standard":
            raise OptionError(f"{name} has no mode; drop {option!r}")
        return replace(scheme, mode=option)
    if option in _DISTRIBUTIONS:
        if not scheme.distribution or scheme.family == "standard":
            raise OptionError(f"{name} has no choice of distribution; drop {option!r}")
        return replace(scheme, distribution=option)
    try:
        number = float(option)
    except ValueError:
        activation, slope = option.partition("=")[0], option.partition("=")[2]
        if slope and not _is_number(slope):
            raise OptionError(f"{option!r}: the slope after '=' is not a number") from None
        gain(activation)
        if not scheme.needs_fans:
            raise OptionError(f"{name} has no gain; drop {option!r}") from None
        return replace(scheme, activation=option)
    if scheme.family in ("zeros", "dirac") or not number > 0 or not math.isfinite(number):
        raise OptionError(f"{name}:{option}: a positive number is a standard deviation or a gain")
    return replace(scheme, number=number)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -- drawing -------------------------------------------------------------------------------------


def generator(seed: int, name: str) -> torch.Generator:
    """Return the random stream of one weight: of `seed` and `name`, and of nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def refusal(scheme: Scheme, linear_map: LinearMap | None, shape: torch.Size) -> str | None:
    """Return why `scheme` cannot fill a weight of this shape, or None if it can."""
    if linear_map is None:
        if scheme.needs_fans:
            return (
                f"{scheme.family} needs a linear map, and this is a free parameter; name it with "
                "trunc_normal, normal or zeros"
            )
        return None
    if scheme.family == "orthogonal" and (len(shape) < 2 or math.prod(shape) == 0):
        return f"orthogonal needs rows and columns, and the shape is {tuple(shape)}"
    if scheme.family == "dirac" and len(shape) < 3:
        return f"dirac needs a convolution's kernel, and the shape is {tuple(shape)}"
    if scheme.needs_fans and min(linear_map.fan_in, linear_map.fan_out) <= 0:
        return f"{scheme.family} needs inputs and outputs, and the shape is {tuple(shape)}"
    return None


def draw(
    scheme: Scheme,
    linear_map: LinearMap | None,
    shape: torch.Size,
    random: torch.Generator,
    following: float = 1.0,
) -> torch.Tensor:
    """Return a float64 tensor of `shape` filled by `scheme`; `following` is the graph's gain.

    Raises:
        OptionError: the scheme is not defined for this shape.
    """
    if (reason := refusal(scheme, linear_map, shape)) is not None:
        raise OptionError(reason)
    empty = torch.zeros(shape, dtype=torch.float64)
    if scheme.family == "zeros":
        return empty
    if scheme.family == "normal":
        return empty.normal_(0, scheme.std(1, 1), generator=random)
    if scheme.family == "trunc_normal":
        nn.init.trunc_normal_(empty, 0, scheme.std(1, 1), generator=random)
        return empty
    assert linear_map is not None  # `refusal` has seen to it
    units = linear_map.layout.units(empty)
    if scheme.family == "orthogonal":
        return linear_map.layout.weight(_orthogonal(units, random) * scheme.gain(following))
    if scheme.family == "dirac":
        return linear_map.layout.weight(_dirac(units))
    std = scheme.std(linear_map.fan_in, linear_map.fan_out, following)
    if scheme.distribution == "normal":
        filled = torch.randn(units.shape, dtype=torch.float64, generator=random) * std
    else:
        filled = torch.rand(units.shape, dtype=torch.float64, generator=random)
        filled = (2 * filled - 1) * (math.sqrt(3.0) * std)
    return linear_map.layout.weight(filled)


def _orthogonal(units: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    groups, outputs = units.shape[:2]
    columns = math.prod(units.shape[2:])
    tall = torch.randn(
        groups, max(outputs, columns), min(outputs, columns), dtype=torch.float64, generator=random
    )
    q, r = torch.linalg.qr(tall)
    # Signs of the diagonal make the draw uniform over the orthogonal group.
    q = q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    rows: torch.Tensor = q if outputs >= columns else q.mT
    return rows.reshape(units.shape)


def _dirac(units: torch.Tensor) -> torch.Tensor:
    filled = torch.zeros_like(units)
    centre = filled
    for size in units.shape[3:]:
        centre = centre.select(3, size // 2)
    centre.diagonal(dim1=1, dim2=2).fill_(1.0)
    return filled
