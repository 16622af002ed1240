"""Which classes of values are residual streams, and which are one stream in several calls."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.streams.groups import alike_in, streams_of
from tests.streams.blocks import PreNorm, X, draw
from tests.streams.observed import values


def test_a_chain_without_a_sum_has_no_stream() -> None:
    chain = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)).double()
    assert streams_of([values(chain, X)]) == []


def test_a_sum_that_no_norm_reads_is_none() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.one(x)
            return h + self.two(h)

    assert streams_of([values(Plain().double(), X)]) == []


def test_two_calls_of_one_model_show_one_stream() -> None:
    model = draw(PreNorm())
    one, two = values(model, X), values(model, X[:1])
    (stream,) = streams_of([one, two])
    assert [each for each, _ in stream.classes] == [one, two]
    assert len(alike_in(values(model, X), stream)) == 1
    other = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).double()
    assert alike_in(values(other, X), stream) == []
