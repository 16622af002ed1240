"""Mean and deviation of each unit, and the units that have none to divide by."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.weights.unit_statistics import unit_statistics


def test_statistics_are_taken_over_batch_and_space() -> None:
    output = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    units = unit_statistics(nn.Conv2d(2, 4, 1), output)
    flat = output.transpose(0, 1).reshape(4, -1)
    assert torch.allclose(units.mean, flat.mean(1), rtol=0, atol=1e-13)
    assert torch.allclose(units.std, flat.std(1, correction=0), rtol=0, atol=1e-13)
    assert (units.std - flat.std(1)).abs().min() > 1e-3
    assert units.samples == 54 and units.warning is None
    scaled = output / units.along(1, output, units.std)
    assert torch.allclose(unit_statistics(nn.Conv2d(2, 4, 1), scaled).std, torch.ones(4).double())


def test_a_constant_unit_is_named_and_rounding_is_no_deviation() -> None:
    output = torch.randn(8, 3)
    output[:, 1] = 5.0
    output[:, 2] = 1000.0 + 1e-4 * torch.arange(8) % 2
    units = unit_statistics(nn.Linear(2, 3), output)
    assert units.usable.tolist() == [True, False, False]
    assert units.warning is not None and "2 of 3 units are constant" in units.warning


def test_one_value_a_unit_is_no_batch() -> None:
    units = unit_statistics(nn.Linear(2, 3), torch.randn(1, 3))
    assert not units.usable.any()
    assert units.warning is not None and "pass a larger batch" in units.warning
