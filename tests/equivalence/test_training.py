"""Two models in training mode: outputs, statistics, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rewrite.equivalence.verify import verify
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model
from tests.equivalence.networks import X


def test_weight_norm_is_exact_in_train_and_in_gradients(net):
    other = copy_model(net)
    weight_norm(other.conv)
    found = verify(net, other, X, contract=Contract.EXACT)
    assert found.ok, str(found)
    assert {case.name for case in found.cases} >= {"gradients", "train mode"}


@pytest.mark.parametrize(
    ("break_", "word"),
    [
        (lambda m: setattr(m.norm, "momentum", 0.2), "running_mean"),
        (lambda m: setattr(m, "drop", nn.Identity()), "train mode"),
    ],
)
def test_exact_sees_what_only_training_shows(net, break_, word):
    other = copy_model(net)
    break_(other)
    assert verify(net, other, X, contract=Contract.EXACT_IN_EVAL).ok
    found = verify(net, other, X, contract=Contract.EXACT)
    assert not found.ok
    assert word in str(found)


def test_exact_sees_a_gradient_that_is_cut():
    class Cut(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.cut = nn.Linear(3, 3), cut

        def forward(self, x):
            y = self.inner(x)
            return y.detach() + x if self.cut else y + x

    found = verify(Cut(False), Cut(True), (torch.ones(2, 3),), contract=Contract.EXACT)
    assert not found.ok
    assert "gradient" in str(found)
