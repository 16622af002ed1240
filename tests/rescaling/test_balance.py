"""Scales, couplings and their balance: convexity, groups that are coupled, and the report."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewrite.graph.capture import capture
from rewrite.rescaling.balance import Balance, solve
from rewrite.rescaling.couplings import couplings
from rewrite.rescaling.plan import measure_of
from rewrite.rescaling.scales import Scales

RIGHT, WRONG = 1e-9, 1e-3


class Stream(nn.Module):
    """A stream that a layer reads and writes at once: units of one group are coupled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, width), nn.Linear(width, width)
        self.deep, self.last = nn.Linear(width, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.again(x))
        return self.last(torch.relu(self.deep(x)))


def solver(model: nn.Module, objective: str) -> Balance:
    captured = capture(model, torch.zeros(1, 3, dtype=torch.float64))
    scales = Scales(captured)
    largest, counted = objective == "equalize", objective == "path"
    edges = couplings(scales, measure_of(captured, objective), largest, counted)
    units = [group.units for group in scales.groups()]
    return Balance(edges, units, largest=largest, counted=counted)


def stream(width: int, seed: int) -> Stream:
    torch.manual_seed(seed)
    model = Stream(width).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.exp(2 * torch.randn_like(parameter)))
    return model


@pytest.mark.parametrize("objective", ["l2", "path"])
@settings(max_examples=4)
@given(width=st.integers(1, 6), seed=st.integers(0, 999))
def test_every_sweep_goes_down_to_the_one_minimum(objective: str, width: int, seed: int) -> None:
    balance = solver(stream(width, seed), objective)
    losses = [balance.loss()]
    for _ in range(5):
        balance.run(sweeps=1)
        losses.append(balance.loss())
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(losses))
    found = balance.run(tolerance=1e-12, sweeps=20000)
    assert found.after < 1e-8
    at = balance.log_r.clone()
    least = balance.loss()
    for _ in range(5):
        balance.log_r[:-1] = at[:-1] + 0.1 * torch.randn(len(at) - 1, dtype=torch.float64)
        balance._add_up(range(len(balance._totals)))
        assert balance.loss() > least


@settings(max_examples=4)
@given(width=st.integers(1, 6), seed=st.integers(0, 999))
def test_equalize_reaches_equal_ranges(width: int, seed: int) -> None:
    balance = solver(stream(width, seed), "equalize")
    found = balance.run(tolerance=1e-10, sweeps=5000)
    assert found.after < 1e-8 and found.before > found.after
    for _, written, read in balance.parts():
        torch.testing.assert_close(written, read, rtol=1e-7, atol=0)


@given(k=st.floats(-50, 50), a=st.floats(1e-3, 1e3), b=st.floats(1e-3, 1e3))
def test_solve_is_the_positive_root(k: float, a: float, b: float) -> None:
    one = torch.tensor([a, b, k], dtype=torch.float64)
    r = solve(one[0:1], one[1:2], one[2:3])
    assert float(r) > 0
    assert float(one[0] * r - one[1] / r) == pytest.approx(k, rel=1e-9, abs=1e-9 * (a + b))


def test_a_long_chain_is_balanced_in_few_sweeps() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(3, 8)]
    for number in range(30):
        layers += [nn.ReLU(), nn.Linear(8, 8)]
        with torch.no_grad():
            layers[-1].weight.mul_(10.0 ** (number % 3))
    balance = solver(nn.Sequential(*layers).double(), "l2")
    found = balance.run()
    assert found.after < RIGHT and found.sweeps < 200
