"""Rows that are alike but for their numbers, shown as one.

    layer1.0.bn1, layer1.0.bn2, ..., layer4.1.bn2   ->   layer{1..4}.{0,1}.bn{1,2}, 16 alike

Two rows are alike where all of their texts are equal once each number in them is left out. In a
merged text a number that is the same in all rows stays; consecutive ones become `{1..4}`, up to
three others `{1,3,8}`, more their range `{64..512}`. How many rows there are stands beside it,
since not every combination of the numbers need be among them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Alike:
    """Rows that differ in numbers only: their merged texts, how many there are, and which."""

    texts: tuple[str, ...]
    count: int
    places: tuple[int, ...] = field(default=(), compare=False)


def group_alike(rows: Sequence[tuple[str, ...]]) -> list[Alike]:
    """Return the rows merged where they are alike, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(tuple(_NUMBER.sub("#", text) for text in row), []).append(place)
    return [
        Alike(
            tuple(_merged(texts) for texts in zip(*(rows[place] for place in group), strict=True)),
            len(group),
            tuple(group),
        )
        for group in groups.values()
    ]


def _merged(texts: Sequence[str]) -> str:
    """Return one text for texts that differ in numbers only."""
    if len(set(texts)) == 1:
        return texts[0]
    between = _NUMBER.split(texts[0])
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    parts = [between[0]]
    for values, after in zip(columns, between[1:], strict=True):
        parts += [_numbers(values), after]
    return "".join(parts)


def _numbers(texts: Sequence[str]) -> str:
    """Return the numbers of one place: one, a run, a few, or a range."""
    values = sorted({int(text) for text in texts})
    if len(values) == 1:
        return texts[0]
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}..{values[-1]}}}"
    if len(values) <= 3:
        return f"{{{','.join(map(str, values))}}}"
    return f"{{{values[0]}..{values[-1]}}}"
