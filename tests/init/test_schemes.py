"""Schemes against their closed forms: the variance of 1e6 draws by scheme and layout."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from rewrite.errors import OptionError
from rewrite.init.draw import draw, generator
from rewrite.init.gains import activation_names, gain
from rewrite.init.schemes import parse_scheme, scheme_names
from rewrite.weights.fans import linear_maps

# About 1e6 weights each, so that a sample variance is within 0.6 % of the true one (4 sigma).
LAYERS = {
    "linear": nn.Linear(1000, 1000),
    "conv": nn.Conv2d(128, 868, 3),
    "grouped": nn.Conv2d(512, 868, 3, groups=4),
    "depthwise": nn.Conv1d(100_000, 100_000, 10, groups=100_000),
    "transposed": nn.ConvTranspose2d(64, 868, (6, 3), stride=(3, 1)),
    "strided": nn.Conv2d(128, 868, 3, stride=2),
}
# The fans of those layers, by hand.
FANS = {
    "linear": (1000, 1000),
    "conv": (1152, 7812),
    "grouped": (1152, 1953),
    "depthwise": (10, 10),
    "transposed": (384, 15624),
    "strided": (1152, 1953),
}
SPREAD = {
    "glorot": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "he:relu": lambda fan_in, fan_out: 2 / fan_in,
    "he:fan_out:relu": lambda fan_in, fan_out: 2 / fan_out,
    "he_uniform:fan_avg:leaky_relu=0.2": lambda i, o: 2 / 1.04 / ((i + o) / 2),
    "lecun": lambda fan_in, fan_out: 1 / fan_in,
    "standard": lambda fan_in, fan_out: 1 / (3 * fan_in),
    "trunc_normal": lambda fan_in, fan_out: 0.02**2,
}


def drawn(scheme: str, layer: nn.Module, seed: int = 0) -> torch.Tensor:
    (linear_map,) = linear_maps(layer)
    return draw(parse_scheme(scheme), linear_map, layer.weight.shape, generator(seed, "w"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scheme", SPREAD)
def test_variance_of_a_million_draws(scheme, layer):
    sample = drawn(scheme, LAYERS[layer])
    expected = SPREAD[scheme](*FANS[layer])
    assert sample.shape == LAYERS[layer].weight.shape
    assert sample.numel() > 9e5
    # Four standard errors of a normal's variance and mean.
    assert sample.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / sample.numel()))
    assert abs(sample.mean().item()) < 4 * math.sqrt(expected / sample.numel())


@pytest.mark.parametrize(
    ("scheme", "distribution"),
    [
        ("glorot", stats.uniform(-math.sqrt(6 / 2000), 2 * math.sqrt(6 / 2000))),
        ("glorot_normal", stats.norm(0, math.sqrt(1 / 1000))),
        ("standard", stats.uniform(-1 / math.sqrt(1000), 2 / math.sqrt(1000))),
        ("he:linear", stats.norm(0, math.sqrt(1 / 1000))),
        ("trunc_normal", stats.norm(0, 0.02)),
        ("normal:0.5", stats.norm(0, 0.5)),
    ],
)
def test_distribution(scheme, distribution):
    sample = drawn(scheme, LAYERS["linear"]).flatten()[:20_000].numpy()
    assert stats.kstest(sample, distribution.cdf).pvalue > 1e-3
    assert stats.kstest(sample * 1.05, distribution.cdf).pvalue < 1e-3


def test_zeros():
    assert not drawn("zeros", nn.Conv2d(3, 4, 2)).any()


def test_following_gain_is_used_by_he_alone():
    (linear_map,) = linear_maps(nn.Linear(3, 3))
    shape = torch.Size((3, 3))
    for scheme, factor in [("he", 3.0), ("he:tanh", 1.0), ("glorot", 1.0), ("he:2.0", 1.0)]:
        parsed = parse_scheme(scheme)
        once = draw(parsed, linear_map, shape, generator(0, "w"), 1.0)
        thrice = draw(parsed, linear_map, shape, generator(0, "w"), 3.0)
        torch.testing.assert_close(thrice, factor * once)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("he_norml", "unknown scheme 'he_norml'; did you mean he_normal"),
        ("he:rellu", "unknown activation 'rellu'; known are"),
        ("he:leaky_relu=x", "not a number"),
        ("orthogonal:fan_in", "has no mode"),
        ("zeros:normal", "no choice of distribution"),
        ("zeros:relu", "has no gain"),
        ("normal:-1", "positive"),
        ("he:nan", "positive"),
    ],
)
def test_bad_schemes_say_what_is_known(text, said):
    with pytest.raises(OptionError, match=said):
        parse_scheme(text)


def test_known_names_are_all_listed():
    with pytest.raises(OptionError) as caught:
        parse_scheme("nope")
    assert all(name in str(caught.value) for name in scheme_names())
    with pytest.raises(OptionError) as caught:
        gain("nope")
    assert all(name in str(caught.value) for name in activation_names())
    for name in scheme_names():
        parse_scheme(name)
    for name in activation_names():
        assert gain(name) > 0
