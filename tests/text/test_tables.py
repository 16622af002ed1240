"""Rows are a table where it fits, and no name is broken within a word where it does not."""

import io

import pytest
from rich.console import Console

from rewrite.text.tables import Rows, merged

NAMES = [f"backbone.stage{i}.block{j}.norm_after_attention" for i in range(3) for j in range(2)]


def printed(rows: Rows, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(rows)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_name_is_broken(width: int) -> None:
    rows = Rows(("module", "norm", "read by"), [(n, "LayerNorm", n[:30]) for n in NAMES], "Norms")
    lines = printed(rows, width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= max(width, max(map(len, NAMES)) + 2)
    if width >= 50:
        assert all(name in text and name[:30] in text for name in NAMES)
    assert ("module" in lines[1]) is (width == 200)


def test_sentences_go_over_several_lines_in_the_last_column() -> None:
    rows = Rows(
        ("pass", "why"), [("fold", "the value is read by two layers at once " * 3)], prose=True
    )
    lines = printed(rows, 40)
    assert lines[0].split() == ["pass", "why"] and len(lines) > 3
    assert Rows(("pass", "why"), [("fold", "x" * 60)], prose=True)._width() > 40


def test_empty_cells_are_left_out_below_a_name() -> None:
    lines = printed(Rows(("layer", "mean", "std"), [("a" * 30, "", "1.5")]), 20)
    assert lines[-1].strip() == "std 1.5"


def test_no_rows_are_a_head() -> None:
    assert printed(Rows(("a", "b"), []), 80) == ["a  b"]


def test_rows_that_are_alike_are_one_unless_all_are_wanted() -> None:
    rows = [("bn1", "64"), ("bn2", "128"), ("ln", "64")]
    assert merged(rows, verbose=False) == [("bn{1,2}  2 alike", "{64,128}"), ("ln", "64")]
    assert merged(rows, verbose=True) == rows
