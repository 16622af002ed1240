"""A plan for a stream: nothing outside may see it, and no parameter is given two maps."""

from __future__ import annotations

from tests.streams.blocks import Careful, PreNorm, bare, centred, draw, rotated


def test_declines_a_stream_that_is_returned() -> None:
    (skip,) = centred(draw(PreNorm(returns=True))).report.skips
    assert "the model returns it" in skip.reason


def test_declines_code_that_no_call_took() -> None:
    (skip,) = centred(draw(PreNorm(block=Careful))).report.skips
    assert "no call took it" in skip.reason


def test_a_writer_that_another_value_shares_is_declined() -> None:
    (skip,) = centred(draw(PreNorm(shared=True))).report.skips
    assert "also read by" in skip.reason


def test_rotation_declines_a_stream_that_is_returned() -> None:
    (skip,) = rotated(bare(returns=True)).report.skips
    assert "the model returns it" in skip.reason


def test_declines_a_parameter_that_is_read_elsewhere() -> None:
    (skip,) = rotated(bare(shared=True)).report.skips
    assert "read by gelu in the model" in skip.reason


def test_rotation_declines_code_that_no_call_took() -> None:
    (skip,) = rotated(bare(block=Careful)).report.skips
    assert "no call took it" in skip.reason
