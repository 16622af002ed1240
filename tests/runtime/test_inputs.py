from __future__ import annotations

import torch
from torch import nn

from rewrite.equivalence.variations import adversarial
from rewrite.runtime.inputs import Inputs, batches_for
from rewrite.runtime.leaves import tensors


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


def test_labels_beside_the_inputs_are_left_out():
    batch = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    assert len(tensors(list(batches_for(nn.Linear(3, 1), batch).args))) == 1
