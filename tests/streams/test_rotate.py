"""Which streams can be turned: norms hand a rotation on, linear readers undo it."""

from __future__ import annotations

from torch import nn

from tests.streams.blocks import PostNorm, PreNorm, X, bare, draw, error, rotated


def test_reads_the_stream_itself_by_a_linear_layer() -> None:
    model = bare(raw=True)
    result = rotated(model)
    assert len(result.report.changes) == 1
    assert error(model, result.model, X) < 1e-12


def test_declines_a_layer_norm() -> None:
    (skip,) = rotated(draw(PreNorm())).report.skips
    assert "run ln-to-rms first" in skip.reason


def test_declines_a_weight_that_is_not_one() -> None:
    (skip,) = rotated(draw(PreNorm(nn.RMSNorm))).report.skips
    assert "fold it first" in skip.reason


def test_declines_an_activation_that_writes() -> None:
    (skip,) = rotated(bare(activation=True)).report.skips
    assert "written by gelu" in skip.reason


def test_declines_post_norm() -> None:
    report = rotated(draw(PostNorm())).report
    assert not report.changes and report.skips
