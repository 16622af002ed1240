"""Singular values of the Jacobian between consecutive layers."""

import pytest
import torch
from torch import nn

from rewrite.signals.jacobian import layer_jacobians
from rewrite.signals.measure import signal
from tests.signals.test_measure import chain


def test_jacobian_of_a_small_network_is_exact():
    model = chain().double()
    x = torch.randn(1, 40, dtype=torch.float64)
    (row,) = [r for r in signal(model, x).layers if r.jacobian]
    slope = 1 - model[0](x).tanh() ** 2
    values = torch.linalg.svdvals(model[2].weight * slope)
    assert row.jacobian.source == "0"
    assert row.jacobian.largest == pytest.approx(values[0].item(), rel=1e-12)
    assert row.jacobian.mean == pytest.approx(values.mean().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(400, 700), (700, 400), (500, 500)])
def test_jacobian_of_a_large_layer_by_lanczos(shape):
    columns, rows = shape
    model = nn.Sequential(nn.Linear(5, columns), nn.Tanh(), nn.Linear(columns, rows)).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    (row,) = [r for r in signal(model, x).layers if r.jacobian]
    values = torch.linalg.svdvals(model[2].weight * (1 - model[0](x).tanh() ** 2))
    # From below, and from one random start: a few percent.
    assert row.jacobian.largest == pytest.approx(values[0].item(), rel=0.05)
    assert row.jacobian.largest <= values[0].item() * (1 + 1e-9)
    assert row.jacobian.mean == pytest.approx(values.mean().item(), rel=0.05)
    assert row.jacobian.rms == pytest.approx(values.square().mean().sqrt().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_jacobians_whose_spectrum_is_one_value_or_mostly_zero(dtype):
    """Lanczos ends after one step, or goes on with rounding noise: zeros stay zeros."""
    x = torch.ones(1, 1024, dtype=dtype, requires_grad=True)
    first = x * 2
    twice, some = first * 2, first * (torch.arange(1024) < 64).to(dtype)
    found = layer_jacobians([("a", first), ("b", twice)], [], 0)[1]
    tolerance = 4 * torch.finfo(dtype).eps
    for value in (found.largest, found.rms, found.mean):
        assert value == pytest.approx(2.0, rel=tolerance)
    found = layer_jacobians([("a", first), ("b", some)], [], 0)[1]
    assert found.largest == pytest.approx(1.0, rel=tolerance)
    # One random vector of 1,024 lies in the 64 axes by 1/16, give or take 1/6 of that.
    assert found.mean == pytest.approx(1 / 16, rel=0.5)
    assert found.rms == pytest.approx(1 / 4, rel=0.25)
    assert found.rms**2 == pytest.approx(found.mean, rel=0.02)  # values are 0 or 1


def test_a_dead_branch_has_jacobian_zero():
    x = torch.ones(1, 300, dtype=torch.float64, requires_grad=True)
    first = x * 2
    second = (first * 0).clone()
    notes: list[str] = []
    found = layer_jacobians([("a", first), ("b", second)], notes, 0)
    assert (found[1].largest, found[1].mean, notes) == (0.0, 0.0, [])
