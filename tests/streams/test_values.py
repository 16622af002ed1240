"""Values that have to change together, what makes them and who reads them."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.streams.classes import CallKind
from rewrite.streams.groups import streams_of
from tests.streams.blocks import PreNorm, X, draw
from tests.streams.observed import values


def test_sums_join_values_and_a_norm_or_a_layer_parts_them() -> None:
    found = values(draw(PreNorm()), X)
    (stream,) = streams_of([found])
    kinds = [source.kind for _, source in stream.sources()]
    assert kinds.count(CallKind.LINEAR) == 5  # embed, and proj and mlp of two blocks
    assert kinds.count(CallKind.PARAMETER) == 1 and CallKind.OTHER not in kinds
    assert {reader.kind for _, reader in stream.readers()} == {CallKind.NORM}
    assert len(list(stream.readers())) == 5


def test_an_axis_of_a_weight_is_named_for_writers_and_readers() -> None:
    found = values(draw(PreNorm(raw=True)), X)
    (stream,) = streams_of([found])
    written = {(use.tensor, use.axis) for _, source in stream.sources() for use in source.uses}
    assert {("embed.weight", 0), ("blocks.0.proj.weight", 0), ("blocks.0.proj.bias", 0)} <= written
    read = [reader.use for _, reader in stream.readers() if reader.kind is CallKind.LINEAR]
    assert [(use.tensor, use.axis) for use in read if use is not None] == [("head.weight", 1)]


def test_an_activation_is_a_source_that_no_parameter_writes() -> None:
    found = values(draw(PreNorm(activation=True)), X)
    (stream,) = streams_of([found])
    assert CallKind.OTHER in {source.kind for _, source in stream.sources()}


def test_a_layer_scale_is_a_source_of_its_own() -> None:
    (stream,) = streams_of([values(draw(PreNorm(scale=True)), X)])
    scaled = [source.scale for _, source in stream.sources() if source.kind is CallKind.SCALED]
    assert scaled == ["blocks.0.gamma", "blocks.1.gamma"]


def test_one_number_a_token_scales_no_channel() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Linear(16, 16), nn.Linear(16, 1)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            h = h + self.embed(self.norm(h)) * torch.sigmoid(self.gate(x))
            return self.head(self.norm(h))

    (stream,) = streams_of([values(draw(Gated()), X)])
    assert {source.kind for _, source in stream.sources()} == {CallKind.LINEAR}
