from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.training import correct_momentum, linear_scaling, normalized_decay, warmup


def test_linear_scaling() -> None:
    assert linear_scaling(0.1, 8192) == pytest.approx(3.2)
    assert linear_scaling(0.1, 64, reference=32) == pytest.approx(0.2)
    with pytest.raises(OptionError, match="batch size 0"):
        linear_scaling(0.1, 0)


def test_warmup_begins_at_the_reference_rate_and_ends_at_the_scaled_one() -> None:
    factors = [warmup(step, 5, start=1 / 8) for step in range(7)]
    steps = [1 / 8 + 7 / 8 * t / 5 for t in range(5)]
    assert factors == pytest.approx([*steps, 1.0, 1.0])
    assert warmup(0, 0) == 1.0
    with pytest.raises(OptionError, match="step -1"):
        warmup(-1, 5)


def test_warmup_drives_a_scheduler() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=3.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: warmup(t, 4, start=1 / 32))
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1, 0.875, 1.65, 2.425, 3.2, 3.2])


@pytest.mark.parametrize("corrected", [True, False])
def test_the_two_forms_of_momentum_agree_with_the_correction_only(corrected: bool) -> None:
    rates = [0.1, 0.1, 0.4, 0.4, 0.05]
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    other = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=rates[0], momentum=0.9)
    velocity = torch.zeros_like(other)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = weight.detach().sin()
        if corrected and step:
            correct_momentum([velocity], rates[step - 1], rate)
        velocity = 0.9 * velocity + rate * other.sin()
        other = other - velocity
        optimizer.step()
    assert (float((weight.detach() - other).abs().max()) < 1e-14) == corrected


@pytest.mark.parametrize("number", [float("nan"), -1.0])
def test_numbers_that_make_no_rate(number: float) -> None:
    velocity = [torch.ones(2)]
    for call, place in (
        (lambda: linear_scaling(0.1, 32, number), "reference"),
        (lambda: warmup(0, 5, number), "of 5 from"),
        (lambda: correct_momentum(velocity, number, 0.1), "from rate"),
        (lambda: correct_momentum(velocity, 0.1, number), "to"),
        (lambda: normalized_decay(number, 32, 1000, 1), "decay"),
    ):
        with pytest.raises(OptionError, match=f"{place} {number}"):
            call()
    assert torch.equal(velocity[0], torch.ones(2))
