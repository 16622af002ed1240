"""What runs a model in another way: branches in Python, attention written out, the batch's axes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from rewrite.runtime.attention import AttentionWrittenOut, attention
from rewrite.runtime.batch_axes import find_batch_axes
from rewrite.runtime.control_flow import branches_in_python
from rewrite.runtime.copying import copy_model
from rewrite.runtime.inputs import Inputs


def test_a_loop_runs_in_python():
    with branches_in_python():
        steps, value = torch.while_loop(
            lambda i, x: i < 5, lambda i, x: (i + 1, x * 2), (torch.tensor(0), torch.ones(2))
        )
    assert int(steps) == 5
    assert value.tolist() == [32.0, 32.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True, True, True]] * 4)},
        {"attn_mask": torch.linspace(-1, 1, 20).reshape(4, 5)},
    ],
    ids=["plain", "causal", "scale", "bool", "float"],
)
def test_attention_written_out_is_attention(options):
    generator = torch.Generator().manual_seed(0)
    length = 4 if "is_causal" in options else 5

    def draw(size):
        return torch.randn(2, 3, size, 8, generator=generator, dtype=torch.float64)

    query, key, value = draw(4), draw(length), draw(length)
    options = {
        name: v.double() if name == "attn_mask" and v.is_floating_point() else v
        for name, v in options.items()
    }
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention(query, key, value, **options), expected)
    with AttentionWrittenOut() as written:
        again = functional.scaled_dot_product_attention(query, key, value, **options)
    assert written.calls == 1
    torch.testing.assert_close(again, expected)


def test_attention_of_grouped_heads():
    query, key = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 4, 8)
    expected = functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    torch.testing.assert_close(attention(query, key, key, enable_gqa=True), expected)


class States(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=batch_first)

    def forward(self, x, h, c):
        return self.lstm(x, (h, c))[0]


class Table(nn.Module):
    def forward(self, x, table):
        return x @ table


@pytest.mark.parametrize(
    ("model", "shapes", "axes"),
    [
        (nn.Linear(4, 2), [(3, 4)], (0,)),
        (States(True), [(2, 4, 5), (1, 2, 6), (1, 2, 6)], (0, 1, 1)),
        (States(True), [(1, 4, 5), (1, 1, 6), (1, 1, 6)], (0, 1, 1)),
        (States(False), [(4, 2, 5), (1, 2, 6), (1, 2, 6)], (1, 1, 1)),
        (Table(), [(3, 4), (4, 2)], (0, None)),
    ],
    ids=["linear", "batch first", "batch of one", "time first", "a table"],
)
def test_the_batch_is_found_wherever_it_stands(model, shapes, axes):
    leaves = [torch.randn(shape) for shape in shapes]
    taken = [frozenset()] * len(leaves)
    assert find_batch_axes(model.eval(), Inputs(tuple(leaves)), leaves, taken, 0) == axes


class Fixed(nn.Module):
    def forward(self, x, y):
        return x.reshape(2, 6) @ y.reshape(6, 5)


def test_a_model_of_one_size_has_no_batch():
    leaves = [torch.randn(3, 4), torch.randn(5, 6)]
    assert find_batch_axes(Fixed(), Inputs(tuple(leaves)), leaves, [frozenset()] * 2, 0) is None


def test_a_weight_normed_lstm_that_has_run_can_be_copied():
    lstm = nn.LSTM(4, 3)
    weight_norm(lstm, "weight_hh_l0")
    x = torch.randn(5, 2, 4)
    before = lstm.eval()(x)[0]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(lstm)
    torch.testing.assert_close(copy_model(lstm)(x)[0], before)
