"""Signal plots: layers by name, zeros in sight, a figure without a path."""

import math

import pytest
import torch
from torch import nn

import rewrite

pytest.importorskip("matplotlib")


def measured(depth: int) -> rewrite.Signal:
    torch.manual_seed(0)
    layers = [(f"block{n}", nn.Linear(8, 8)) for n in range(depth)]
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return rewrite.signal(model, torch.randn(4, 8))


@pytest.mark.parametrize("depth", [1, 5, 12, 40])
def test_layers_are_named_and_never_too_many(depth: int) -> None:
    for axes in measured(depth).plot().axes:
        names = [label.get_text() for label in axes.get_xticklabels()]
        assert names[0] == "block0" and names[-1] == f"block{depth - 1}"
        assert len(names) == len(set(names)) <= 12
        assert all(f"block{tick:g}" == n for tick, n in zip(axes.get_xticks(), names, strict=True))


def test_a_zero_is_drawn_on_a_logarithmic_axis() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    axes = rewrite.signal(model, torch.randn(4, 8)).plot().axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "symlog"
    assert 0.0 in axes.lines[0].get_ydata() and low < 0 < high
    assert axes.transData.transform((0, 0.0))[1] > axes.transData.transform((0, low))[1]


def test_no_decade_below_zero_is_drawn() -> None:
    axes = measured(5).plot().axes[0]
    assert math.isclose(axes.get_ylim()[0], -0.2 * min(axes.lines[0].get_ydata()))
