"""Sizes are arithmetic on numbers and symbols; names are identifiers."""

from __future__ import annotations

import pytest

from rewrite.checkpoint.vetting.sizes import check_size, identifier
from rewrite.errors import CheckpointError


@pytest.mark.parametrize("text", ["s0", "2*s0 + 1", "Max(1, s0//2)", "Pow(s0, 2)"])
def test_sizes(text):
    check_size(text)


@pytest.mark.parametrize("text", ["9**9**9", "Pow(s0, 99)", "os", "s0.x", "f(s0)", "'s0' * 's'  ;"])
def test_what_is_no_size(text):
    with pytest.raises(CheckpointError, match="size"):
        check_size(text)


@pytest.mark.parametrize("name", ["x=1", "a b", "", "class", "ä", 3])
def test_what_is_no_identifier(name):
    assert identifier("input_1") == "input_1"
    with pytest.raises(CheckpointError, match="name"):
        identifier(name)
