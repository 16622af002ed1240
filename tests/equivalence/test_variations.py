"""Variations of an input expose what the input itself does not."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.equivalence.variations import adversarial
from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import verify
from rewrite.runtime.inputs import Inputs


def test_batch_size_one_alone_would_not_show_a_mixed_up_batch():
    class Mixed(nn.Module):
        def __init__(self, mixed: bool) -> None:
            super().__init__()
            self.mixed = mixed

        def forward(self, x):
            return x - x.mean(0) if self.mixed else x * 0 if len(x) == 1 else x

    x = (torch.ones(1, 4),)
    assert verify(Mixed(False), Mixed(True), x, level=Level.QUICK).ok
    assert not verify(Mixed(False), Mixed(True), x).ok


def test_adversarial_varies_value_batch_and_space():
    cases = dict(adversarial(Inputs.of(torch.ones(1, 3, 64, 64))))
    first = {name: case.args[0] for name, case in cases.items()}
    assert float(first["zeros"].abs().max()) == 0
    assert float(first["ones"].min()) == 1
    assert int((first["impulse"] != 0).sum()) == 1
    assert {first[f"batch of {n}"].shape[0] for n in (1, 2, 7)} == {1, 2, 7}
    assert {t.shape[-1] for t in first.values()} == {32, 64, 96}


def test_adversarial_keeps_indices_in_range():
    ids = torch.tensor([[3, 1, 4]])
    for _, case in adversarial(Inputs.of(ids)):
        assert set(case.args[0].flatten().tolist()) <= {3, 1, 4}


def test_adversarial_is_the_same_for_the_same_seed():
    x = torch.ones(1, 3, 8, 8)
    for (name, a), (_, b) in zip(adversarial(Inputs.of(x)), adversarial(Inputs.of(x)), strict=True):
        assert torch.equal(a.args[0], b.args[0]), name
