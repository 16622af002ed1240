"""Rows of a value are rows of that value; rows that are written may be another's."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from torch import Tensor, nn

from passes import FoldNorm, LayerNormToRMSNorm
from rewrite.observe.code.rows import selects_rows
from tests.observe.code.chooses import Stream, check


def in_a_row(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag:
        h[:, 0] = self.other(x)[:, 0]
    return self.head(h)


@pytest.mark.parametrize("forward", [in_a_row], ids=lambda f: f.__name__)
def test_a_row_that_another_value_may_fill_is_not_folded_into(forward: Any) -> None:
    check(forward, FoldNorm(), nn.LayerNorm(16))


def into_a_stream_by_a_row(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.embed(x)
    if flag:
        h[:, 0] = self.other(x)[:, 0]
    return self.head(self.norm(h))


@pytest.mark.parametrize("forward", [into_a_stream_by_a_row], ids=lambda f: f.__name__)
def test_a_stream_whose_row_another_value_may_fill_is_not_centred(forward: Any) -> None:
    check(forward, LayerNormToRMSNorm(), Stream())


@pytest.mark.parametrize(
    ("text", "rank", "rows"),
    [
        ("h[:, -1]", 3, True), ("h[:, i, :]", 3, True), ("h[0]", 2, True),
        ("h[:, :, 0]", 3, False), ("h[..., 0]", 3, False), ("h[:, 0]", 2, False),
        ("take_along_dim(h, i, dim=1)", 3, True), ("take_along_dim(h, i, dim=-1)", 3, False),
        ("h + 1", 3, False),
    ],
)  # fmt: skip
def test_what_chooses_among_rows_leaves_the_last_axis(text: str, rank: int, rows: bool) -> None:
    assert selects_rows(ast.parse(text, mode="eval").body, rank) is rows
