"""passes.Rebalance: weights that are dead, extreme or not finite, and idempotence beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from models import randomize_norms_
from passes import Rebalance
from rewrite.protocol import apply_pass
from rewrite.rescaling.balance_report import balance_report
from rewrite.runtime.copying import copy_model

OBJECTIVES = ("l2", "equalize", "path")
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

Edit = Callable[[nn.Sequential], object]


def network(edit: Edit) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(6 * 16, 4)]
    model = randomize_norms_(nn.Sequential(*layers)).double().eval()
    with torch.no_grad():
        edit(model)
    return model


def error(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        a, b = one(X), other(X)
    return float((a - b).abs().max() / a.abs().max())


def dead_unit(model: nn.Sequential) -> None:
    model[3].weight[0] = 0
    model[3].bias[0] = 0
    model[6].weight[:, 16:32] = 0


def apart(model: nn.Sequential) -> None:
    """One channel is written 10^30 times larger and read 10^30 times smaller: it is not dead."""
    model[3].weight[0] *= 1e30
    model[3].bias[0] *= 1e30
    model[6].weight[:, :16] /= 1e30


LEFT: dict[str, Edit] = {
    "dead unit": dead_unit,
    "nothing writes": lambda m: m[3].weight.zero_(),
    "norm of gain 0": lambda m: m[1].weight[2].zero_(),
    "norm of negative gain": lambda m: m[1].weight[2].fill_(-3.0),
    "norm of variance 0": lambda m: m[1].running_var[2].zero_(),
    "smaller than a number": lambda m: m[3].weight[0].fill_(5e-324),
    "nearly 0": lambda m: m[3].weight[0].mul_(1e-170),
    "10^30 apart": apart,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", LEFT)
def test_the_function_stays_and_a_second_time_changes_nothing(name: str, objective: str) -> None:
    model = network(LEFT[name])
    applied = apply_pass(Rebalance(objective), copy_model(model), X)
    assert error(model, applied.model) < 1e-12
    assert all(bool(p.isfinite().all()) for p in applied.model.parameters())
    assert not apply_pass(Rebalance(objective), copy_model(applied.model), X).changes


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_channel_beyond_the_largest_scale_is_left_alone_and_counted(objective: str) -> None:
    model = network(apart)
    applied = apply_pass(Rebalance(objective), copy_model(model), X)
    assert torch.equal(applied.model[6].weight[:, :16], model[6].weight[:, :16])
    near = network(lambda m: (m[3].weight[0].mul_(9), m[6].weight[:, :16].div_(9)))
    moved = apply_pass(Rebalance(objective), copy_model(near), X).model
    assert not torch.equal(moved[6].weight[:, :16], near[6].weight[:, :16])


BROKEN: dict[str, Edit] = {
    "infinite weight": lambda m: m[3].weight[0, 0, 0, 0].fill_(math.inf),
    "NaN in a bias": lambda m: m[3].bias[0].fill_(math.nan),
    "NaN in a norm": lambda m: m[1].bias[0].fill_(math.nan),
    "infinite variance": lambda m: m[1].running_var[0].fill_(math.inf),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", BROKEN)
def test_a_layer_that_holds_no_finite_numbers_is_declined_by_name(
    name: str, objective: str
) -> None:
    model = network(BROKEN[name])
    applied = apply_pass(Rebalance(objective), copy_model(model), X)
    before, after = model.state_dict(), applied.model.state_dict()
    broken = next(k for k, v in before.items() if not bool(v.isfinite().all()))
    assert torch.equal(before[broken].nan_to_num(), after[broken].nan_to_num())
    layer = broken.partition(".")[0]
    words = (f"{layer} holds values that are not finite", "overflows float64")
    assert any(word in skip.reason for skip in applied.skips for word in words)


@pytest.mark.parametrize("objective", ["l2", "path"])
def test_squares_that_overflow_are_declined_and_ranges_are_not(objective: str) -> None:
    model = network(lambda m: (m[3].weight.mul_(1e170), m[6].weight.div_(1e168)))
    (skip,) = apply_pass(Rebalance(objective), copy_model(model), X).skips
    assert f"what {objective} balances overflows float64" in skip.reason
    near = network(lambda m: (m[3].weight.mul_(1e4), m[6].weight.div_(1e4)))
    assert apply_pass(Rebalance(objective), near, X).changes


def test_the_report_of_a_model_without_a_free_channel_has_no_rows() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(torch.bfloat16)
    report = balance_report(model, torch.zeros(1, 3, dtype=torch.bfloat16))
    assert not report.rows and "bfloat16" in report.fixed["0"]
