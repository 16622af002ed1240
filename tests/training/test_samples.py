"""Training data in memory: read once, a part held out."""

from __future__ import annotations

import torch

from rewrite.training.samples import read_samples, split, steps_of
from tests.training.test_recover import _data, _teacher


def test_workers_read_what_one_reads() -> None:
    samples = read_samples(_teacher(), _data(), labels=False)
    alone = [
        (size, parts[0].inputs.args[0]) for size, parts in steps_of(samples, 1, 0, 12, 1, (0, 1))
    ]
    for rank in range(3):
        shared = list(steps_of(samples, 1, 0, 4, 1, (rank, 3)))
        for (size, whole), (other, parts) in zip(alone, shared, strict=True):
            assert size == other
            assert torch.equal(whole[rank::3], torch.cat([p.inputs.args[0] for p in parts]))


def test_splitting_holds_one_in_five_out() -> None:
    samples = read_samples(_teacher(), _data(12), labels=False)
    fitted, held = split(samples)
    assert (len(fitted), len(held)) == (10, 2)
    assert torch.equal(held.inputs.args[0], samples.inputs.args[0][[4, 9]])
    assert len(split(samples.take(torch.arange(3)))[1]) == 1
