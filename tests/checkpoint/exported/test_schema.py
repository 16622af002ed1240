"""Sizes of an exported program are numbers and symbols."""

from __future__ import annotations

import pytest

from rewrite.checkpoint.exported.schema import check_size
from rewrite.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    "text", ["Mod(9**9**9**9, 7)", "__import__('os')", "Pow(s0, 99999999)", "s0.x", "x" * 3000]
)
def test_sizes_are_numbers_and_symbols(text):
    with pytest.raises(CheckpointError, match="holds the size"):
        check_size(text)
    check_size("Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))")
