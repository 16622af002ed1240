"""Random networks under random scales: the function, the path norms and their balance.

Every network is a random program over a list of values: layers, activations, pools, sums of values
of one shape, concatenations, shuffles. Its free scales are found, drawn at random and applied.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import randomize_norms_
from passes import Rebalance
from rewrite.fold.executor import run_recipes
from rewrite.fold.store import ModelStore
from rewrite.graph.capture import capture
from rewrite.protocol import apply_pass
from rewrite.rescaling.path_norm import path_norms
from rewrite.rescaling.plan import plan_rescaling
from rewrite.rescaling.scales import Scales
from rewrite.runtime.copying import copy_model
from rewrite.weights.tensor_recipe import Exact

RIGHT, WRONG = 1e-12, 1e-6
ORDERS = (1.0, 2.0, math.inf)
WIDTHS = (4, 6)

STEPS = (
    "conv", "conv", "depthwise", "grouped", "up", "norm", "relu", "leaky", "prelu", "pool",
    "average", "sum", "difference", "larger", "cat", "halves", "shuffle", "factor",
)  # fmt: skip


class Program(nn.Module):
    """A random network: each step makes a new value of one or two of those before it."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList()
        self.factors = nn.ParameterList()
        self.plan: list[tuple[str, int, int, int]] = []
        widths, levels = [4], [0]  # of each value; a level is how often it was pooled or raised
        for kind, one, other in steps:
            # The last value is always read, so that most of them reach the end.
            source = len(widths) - 1 if one % 2 else one % len(widths)
            partner = other % len(widths)
            width, level = widths[source], levels[source]
            made = self._layer(kind, width, other)
            if kind in ("sum", "difference", "larger", "cat") and levels[partner] != level:
                continue
            if kind in ("sum", "difference", "larger") and widths[partner] != width:
                continue
            if (kind in ("halves", "shuffle") and width % 2) or (kind == "cat" and width > 8):
                continue
            self.plan.append((kind, source, partner, len(self.layers) if made else -1))
            if made is not None:
                self.layers.append(made)
            if kind == "factor":
                self.factors.append(nn.Parameter(torch.randn(width, 1, 1)))
            widths.append(self._width(kind, width, widths[partner], made))
            levels.append(level - (kind == "pool") + (kind == "up"))
        self.head = nn.Linear(widths[-1], 2)

    @staticmethod
    def _layer(kind: str, width: int, seed: int) -> nn.Module | None:
        wide = WIDTHS[seed % 2]
        return {
            "conv": lambda: nn.Conv2d(width, wide, 1 + 2 * (seed % 2), padding=seed % 2),
            "depthwise": lambda: nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
            if width <= 6 else nn.Conv2d(width, width, 3, padding=1, groups=width),
            "grouped": lambda: nn.Conv2d(width, width, 1, groups=2) if width % 2 == 0 else None,
            "up": lambda: nn.ConvTranspose2d(width, wide, 2, stride=2, bias=bool(seed % 3)),
            "norm": lambda: nn.BatchNorm2d(width), "prelu": lambda: nn.PReLU(width),
        }.get(kind, lambda: None)()  # fmt: skip

    @staticmethod
    def _width(kind: str, width: int, other: int, made: nn.Module | None) -> int:
        if isinstance(made, nn.Conv2d | nn.ConvTranspose2d):
            return made.out_channels
        return {"cat": width + other, "halves": width // 2}.get(kind, width)

    def forward(self, x: Tensor) -> Tensor:
        values, factors = [self.stem(x)], iter(self.factors)
        for kind, source, partner, layer in self.plan:
            y, z = values[source], values[partner]
            if layer >= 0:
                y = self.layers[layer](y)
            elif kind == "relu":
                y = F.relu(y)
            elif kind == "leaky":
                y = F.leaky_relu(y, 0.3)
            elif kind == "pool":
                y = F.max_pool2d(y, 3, 2, padding=1)
            elif kind == "average":
                y = F.avg_pool2d(y, 3, 1, padding=1, count_include_pad=False)
            elif kind == "sum":
                y = y + z
            elif kind == "difference":
                y = y - z
            elif kind == "larger":
                y = torch.maximum(y, z)
            elif kind == "cat":
                y = torch.cat([y, z], 1)
            elif kind == "halves":
                one, two = y.chunk(2, 1)
                y = one + F.relu(two)
            elif kind == "shuffle":
                n, c, h, w = y.shape
                y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            elif kind == "factor":
                y = y * next(factors)
            values.append(y)
        return self.head(values[-1].mean((2, 3)))


programs = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=9
)

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(steps: list[tuple[str, int, int]], seed: int) -> Program:
    torch.manual_seed(seed)
    model = randomize_norms_(Program(steps), seed).double().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.mul_(torch.exp(torch.randn(len(layer.weight))).view(-1, 1, 1, 1))
    return model


def error(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        a, b = one(X), other(X)
    return float((a - b).abs().max() / (a.abs().max() + 1e-30))


def rescaled(model: Program, seed: int) -> tuple[Program, int]:
    """Return the network under random scales, and how many of them there are."""
    captured = capture(copy_model(model), X)
    plan = plan_rescaling(Scales(captured), "l2")
    torch.manual_seed(seed)
    drawn = tuple(torch.randn(len(part)).double() for part in plan.log_scales)
    plan = replace(plan, log_scales=drawn)
    recipes = [plan.recipe(number) for number in range(len(plan.groups))]
    run_recipes(recipes, ModelStore(captured, recipes), Exact())
    return captured.model, sum(map(len, drawn))


@settings(max_examples=25)
@given(steps=programs, seed=st.integers(0, 99))
def test_neither_function_nor_path_norms_notice_random_scales(
    steps: list[tuple[str, int, int]], seed: int
) -> None:
    model = network(steps, seed)
    scaled, count = rescaled(model, seed + 1)
    assert error(model, scaled) < RIGHT
    before, after = path_norms(model, ORDERS, X), path_norms(scaled, ORDERS, X)
    for p in ORDERS:
        assert after[p] == pytest.approx(before[p], rel=RIGHT)
    if count:
        pairs = zip(model.parameters(), scaled.parameters(), strict=True)
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) > WRONG


@pytest.mark.parametrize("objective", ["l2", "equalize", "path"])
@settings(max_examples=8)
@given(steps=programs, seed=st.integers(0, 99))
def test_balanced_is_the_same_function_and_a_fixed_point(
    objective: str, steps: list[tuple[str, int, int]], seed: int
) -> None:
    model = network(steps, seed)
    balanced = apply_pass(Rebalance(objective), copy_model(model), X).model
    assert error(model, balanced) < RIGHT
    assert list(balanced.state_dict()) == list(model.state_dict())
    assert not apply_pass(Rebalance(objective), copy_model(balanced), X).changes


def test_one_scale_that_is_not_undone_is_noticed() -> None:
    steps = [("relu", 1, 0), ("conv", 1, 1), ("relu", 1, 0), ("conv", 1, 0)]
    model = network(steps, 0)
    scaled, count = rescaled(model, 1)
    assert count == 14 and error(model, scaled) < RIGHT
    with torch.no_grad():
        scaled.layers[0].weight[0] *= 1.001
    norms = path_norms(model, (2,), X), path_norms(scaled, (2,), X)
    assert error(model, scaled) > WRONG and abs(norms[0][2] / norms[1][2] - 1) > WRONG
