"""Sites and skips of the passes on streams: a model without a stream has neither."""

from __future__ import annotations

import torch
from torch import nn

from tests.streams.blocks import PreNorm, centred, draw


def test_leaves_the_rest_alone() -> None:
    model = draw(PreNorm())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    centred(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    plain = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).double()
    report = centred(plain).report
    assert not report.changes and not report.skips  # no stream: nothing is added to anything


def test_in_training_mode_nothing_is_promised_and_the_mode_stays() -> None:
    model = draw(PreNorm()).train()
    assert centred(model).model.training
