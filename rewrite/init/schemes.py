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

import math
from dataclasses import dataclass, replace

from rewrite.errors import OptionError
from rewrite.init.gains import gain
from rewrite.text.suggest import did_you_mean

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
        hint = did_you_mean(name, scheme_names())
        raise OptionError(f"unknown scheme {name!r}{hint}; known are {', '.join(scheme_names())}")
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
