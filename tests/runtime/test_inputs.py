from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from rewrite.runtime.inputs import Inputs, batches_for, call, device_of, dtype_of
from rewrite.runtime.leaves import tensors


def test_labels_beside_the_inputs_are_left_out():
    batch = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    assert len(tensors(list(batches_for(nn.Linear(3, 1), batch).args))) == 1


def test_the_dtype_is_that_of_the_first_tensor_of_floating_point() -> None:
    model = nn.Linear(2, 2).double()
    model._parameters = {"index": nn.Parameter(torch.arange(2), False), **model._parameters}
    assert dtype_of(model) is torch.float64
    norm = nn.BatchNorm1d(2, affine=False).half()
    assert dtype_of(norm) is torch.float16 and dtype_of(nn.ReLU()) is torch.float32


def test_the_device_is_that_of_any_tensor() -> None:
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand()) * random.random() + torch.rand(())


def test_a_call_draws_the_same_of_every_generator_and_puts_them_back() -> None:
    inputs = Inputs.of(torch.ones(2))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, second, other = (call(Draws(), inputs, seed) for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
