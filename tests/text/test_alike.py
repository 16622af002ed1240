"""Rows that are alike but for their numbers become one, and nothing else does."""

from rewrite.text.alike import Alike, group_alike


def test_runs_lists_and_ranges() -> None:
    rows = [
        (f"layer{i}.{j}.bn1", f"BatchNorm2d({64 * 2**i})") for i in range(1, 5) for j in range(2)
    ]
    assert group_alike(rows) == [Alike(("layer{1..4}.{0,1}.bn1", "BatchNorm2d({128..1024})"), 8)]


def test_two_consecutive_numbers_are_named_both() -> None:
    assert group_alike([("a.1",), ("a.2",)]) == [Alike(("a.{1,2}",), 2)]


def test_what_differs_in_words_stays_apart() -> None:
    rows = [("a.1", "taken"), ("a.2", "left"), ("a.3", "taken")]
    assert group_alike(rows) == [Alike(("a.{1,3}", "taken"), 2), Alike(("a.2", "left"), 1)]


def test_equal_rows_are_counted() -> None:
    assert group_alike([("root", "x")] * 3) == [Alike(("root", "x"), 3)]


def test_nothing_is_nothing() -> None:
    assert group_alike([]) == []
