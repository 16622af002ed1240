"""A snapshot remembers answers and tensors of a model that is consumed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rewrite.runtime.inputs import Inputs
from rewrite.snapshot import take_snapshot


def test_it_answers_what_the_model_answered_whatever_becomes_of_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout()), torch.randn(4, 3)
    wanted = model.eval()(x)
    snapshot = take_snapshot(model.train(), Inputs.of((x,)), seed=0)
    assert model.training  # it is run in eval mode, and left as it was
    nn.init.zeros_(model[0].weight)
    assert torch.equal(snapshot(x), wanted)
    assert copy.deepcopy(snapshot) is snapshot


def test_a_tensor_that_was_written_or_exchanged_and_not_named_is_a_violation() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    snapshot = take_snapshot(model, None, seed=0)
    assert snapshot.violations(model, set()) == ()
    with torch.no_grad():
        model[1].running_mean.add_(1)
    model[0].weight = nn.Parameter(model[0].weight.detach())
    model[2].bias = None
    assert snapshot.violations(model, set()) == ("0.weight", "2.bias", "1.running_mean")
    assert snapshot.violations(model, {"0", "1.running_mean"}) == ("2.bias",)
    assert snapshot.violations(model, {"", "2"}) == ("0.weight", "1.running_mean")
