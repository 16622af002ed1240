"""Equality is judged in float64; an input on which rounding decides is left out by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import verify
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model
from tests.equivalence.networks import X, folded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_fold_holds_in_whatever_type_it_is_stored(net, dtype):
    net = net.to(dtype)
    found = verify(net, folded(net), (X[0].to(dtype),))
    assert found.ok, str(found)
    assert (found.rounding is None) == (dtype == torch.float64)


def test_an_input_on_which_rounding_decides_is_left_out_by_name():
    class Chaotic(nn.Module):
        def __init__(self, extra: float) -> None:
            super().__init__()
            self.extra = extra

        def forward(self, x):
            x = x.abs() % 1  # zeros stay zeros
            for _ in range(200):
                x = 3.99 * x * (1 - x)
            return x + self.extra

    class Regrouped(Chaotic):
        def forward(self, x):
            x = x.abs() % 1
            for _ in range(200):
                x = 3.99 * (x - x * x)
            return x + self.extra

    x = (torch.full((1, 4), 0.3),)
    found = verify(Chaotic(0), Regrouped(0), x)
    assert found.ok
    assert "rounding alone" in found.cases[0].skipped
    alone = verify(Chaotic(0), Regrouped(0), x, level=Level.QUICK)
    assert not alone.ok and not all(case.failed for case in alone.cases)
    assert "no input tells the models apart: rounding alone" in alone.reasons[0]


def test_neither_model_is_changed(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    verify(net, copy_model(net), X, contract=Contract.EXACT)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net._forward_hooks
    assert all(p.grad is None for p in net.parameters())
