from __future__ import annotations

from collections.abc import Sequence

import pytest

from rewrite.offenders import TRIALS, offenders

SITES = tuple(f"layer{number}" for number in range(64))


@pytest.mark.parametrize(
    "bad", [{"layer0"}, {"layer63"}, {"layer7", "layer40"}, {"layer8", "layer9"}]
)
def test_offenders_are_found_and_no_others(bad) -> None:
    tried: list[int] = []

    def broken(some: Sequence[str]) -> str:
        tried.append(len(some))
        return "off" if bad & set(some) else ""

    assert offenders(SITES, broken) == dict.fromkeys(sorted(bad), "off")
    assert len(tried) <= 2 * 6 * len(bad)


def test_sites_that_only_together_break_it_lose_the_later_ones() -> None:
    def broken(some: Sequence[str]) -> str:
        return "off" if {"layer0", "layer63"} <= set(some) else ""

    assert offenders(SITES, broken).keys() == set(SITES[32:])


def test_the_search_is_bounded() -> None:
    tried: list[int] = []

    def broken(some: Sequence[str]) -> str:
        tried.append(len(some))
        return "off"

    assert offenders(SITES, broken) == {} and len(tried) == TRIALS
