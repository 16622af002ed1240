"""Which streams can be centred: what writes to them and what reads them."""

from __future__ import annotations

import torch
from torch import nn

from tests.streams.blocks import PostNorm, PreNorm, centred, draw


def test_declines_a_post_norm_stream_with_the_norm_that_writes_to_it() -> None:
    report = centred(draw(PostNorm())).report
    assert not report.changes
    assert {"blocks.0.norm1", "blocks.1.norm1"} <= {skip.target for skip in report.skips}
    written = [skip.reason for skip in report.skips if "written by layer_norm" in skip.reason]
    assert len(written) == 3


def test_declines_an_activation_that_writes_to_it() -> None:
    (skip,) = centred(draw(PreNorm(activation=True))).report.skips
    assert "written by gelu" in skip.reason


def test_declines_a_stream_that_is_read_without_a_norm() -> None:
    (skip,) = centred(draw(PreNorm(raw=True))).report.skips
    assert "head" in skip.reason and "no LayerNorm" in skip.reason


def test_declines_a_norm_of_its_own_code() -> None:
    class Own(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    (skip,) = centred(draw(PreNorm(norm=Own))).report.skips
    assert "Own" in skip.reason or "no LayerNorm" in skip.reason


def test_declines_a_norm_whose_tensors_its_block_reads() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 24, norm_first=True, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), block, nn.LayerNorm(16), nn.Linear(16, 4))
    (skip,) = centred(draw(model)).report.skips
    assert "reads the tensors of 1.norm1 itself" in skip.reason
