"""The first of many names, and how many more."""

from __future__ import annotations

import pytest

from rewrite.text.some import some


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (1, "n0"),
        (3, "n0, n1, n2"),
        (4, "n0, n1, n2 and 1 more"),
        (9, "n0, n1, n2 and 6 more"),
    ],
)
def test_what_is_shown(count: int, text: str) -> None:
    assert some([f"n{number}" for number in range(count)]) == text


def test_how_many_are_shown() -> None:
    assert some(("a", "b", "c"), shown=2) == "a, b and 1 more"
