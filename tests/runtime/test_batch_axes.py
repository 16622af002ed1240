"""The batch axis of each input, found by running the model at other sizes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite.runtime.batch_axes import find_batch_axes, widened
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.leaves import tensors


def axes(
    model: nn.Module, *args: Tensor, taken: list[frozenset[int]] | None = None
) -> tuple[int | None, ...] | None:
    inputs = Inputs(args, {})
    leaves = tensors(inputs.args)
    return find_batch_axes(
        model.eval(), inputs, leaves, taken or [frozenset()] * len(leaves), seed=0
    )


class Runs(nn.Module):
    """An LSTM called with its states."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=batch_first)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.lstm(x, (h, c))


class Table(nn.Module):
    """Multiplies by a table that has no batch."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x @ table


class Fixed(nn.Module):
    """Works for a batch of two alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(2, 6) + y.reshape(2, 6)


class Reduces(nn.Module):
    """Its output does not follow the batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.sum() + y.sum()).reshape(1)


def test_one_input_has_its_batch_in_front_without_a_run() -> None:
    calls: list[Tensor] = []

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return x

    assert axes(Counts(), torch.randn(2, 3, 4, 4)) == (0,) and calls == []


def test_the_states_of_an_lstm_have_it_second() -> None:
    states = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    assert axes(Runs(batch_first=True), torch.randn(4, 7, 3), *states) == (0, 1, 1)
    assert axes(Runs(batch_first=False), torch.randn(7, 4, 3), *states) == (1, 1, 1)


def test_of_sizes_alike_the_one_that_the_model_can_change_is_found() -> None:
    states = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    assert axes(Runs(batch_first=False), torch.randn(2, 2, 3), *states) == (1, 1, 1)


def test_an_input_that_stays_as_it_is_has_none() -> None:
    assert axes(Table(), torch.randn(4, 3), torch.randn(3, 5)) == (0, None)
    assert axes(Table(), torch.randn(4, 3), torch.tensor(2.0).expand(3, 1)) == (0, None)


def test_two_inputs_that_the_model_cannot_take_longer_keep_the_axis_they_share() -> None:
    assert axes(Fixed(), torch.randn(2, 6), torch.randn(2, 6)) == (0, 0)


def test_an_axis_that_the_output_does_not_follow_is_no_proof() -> None:
    assert axes(Reduces(), torch.randn(4, 3), torch.randn(5, 3)) is None


def test_axes_that_are_taken_are_no_batch() -> None:
    x = torch.randn(4, 3)
    assert axes(nn.Linear(3, 3), x, taken=[frozenset({0})]) is None
    assert axes(nn.ReLU(), x, taken=[frozenset({0})]) == (1,)


def test_the_model_is_run_in_its_mode_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).train()
    before = model[0].running_mean.clone()
    inputs = Inputs((torch.randn(3, 3),), {})
    find_batch_axes(model, inputs, tensors(inputs.args), [frozenset({0})], seed=0)
    assert torch.equal(model[0].running_mean, before) and model.training
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize(("size", "rows"), [(1, 2), (3, 3)])
def test_a_dynamic_axis_of_one_is_doubled_and_no_other(size: int, rows: int) -> None:
    x, y = torch.randn(size, 1, 4), torch.randn(1, 4)
    made = widened(Inputs((x,), {"y": y}), {"x": {0: "batch"}, "y": None})
    assert made.args[0].shape == (rows, 1, 4) and made.kwargs["y"] is y
    assert torch.equal(made.args[0][:size], x)
