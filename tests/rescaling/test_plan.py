"""The plan of a rescaling as recipes that state dicts repeat."""

from __future__ import annotations

import json

import pytest
import torch

from models import randomize_norms_
from rewrite.fold.replay import apply_report
from tests.passes.test_rebalance import CASES, MODELS, RIGHT, WRONG, build, error, rebalanced


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_replayed_on_another_checkpoint(name: str, objective: str) -> None:
    model, x = build(name)
    report = json.loads(rebalanced(model, x, objective=objective).report.to_json())
    torch.manual_seed(5)
    other = randomize_norms_(MODELS[name](), 5).double().eval()
    again = MODELS[name]().double().eval()
    again.load_state_dict(apply_report(report, other.state_dict()))
    assert error(other, again, x) < RIGHT
    pairs = zip(other.parameters(), again.parameters(), strict=True)
    moved = [(a - b).abs().max() for a, b in pairs]
    assert max(moved) > WRONG
