"""Norms in an exported call, whichever way they are written."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.observe import blocks
from tests.observe.blocks import WIDTH, Decoder, RMSNorm, randomized
from tests.observe.folding import folded, targets

NORMS = [RMSNorm, blocks.GemmaNorm, blocks.WrittenOutLayerNorm]
NORMS += [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH)]


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_a_decoder_folds(norm: Any) -> None:
    result = folded(randomized(Decoder(norm)))
    names = {f"layers.{i}.norm{n}" for i in (0, 1) for n in (1, 2)} | {"norm"}
    assert targets(result) == names
    assert any("example input" in note for note in result.report.notes)


def test_the_weight_of_a_layer_norm_is_gone_and_that_of_a_class_stays_neutral() -> None:
    standard = folded(randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))).model
    assert not any("norm" in key for key in standard.state_dict())
    assert standard.head.bias is not None, "the shift of the last norm is a bias of the head"
    written = folded(randomized(Decoder(blocks.GemmaNorm)))
    assert not written.model.norm.weight.any(), "1 + w is one where w is zero"
    assert type(written.model) is Decoder
    assert "stays" in next(c.note for c in written.report.changes if c.target == "norm")
