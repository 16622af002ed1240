"""The rows of a sweep: one line of JSON each, appended as it is done; a later one of a name counts.

A sweep that was stopped goes on where it was: what has a row is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the last row of each name, at the place of its first; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:  # by lines of the file: JSON may hold U+2028
        return list({row["name"]: row for row in map(json.loads, lines)}.values())


def complete(path: Path, names: Iterable[str], measure: Callable[[str], Row]) -> None:
    """Measure each name that has no row yet, and append the row as it comes."""
    done = {row["name"] for row in read(path)}
    for name in names:
        if name not in done:
            row = measure(name)
            append(path, row)
            print(row, flush=True)


def append(path: Path, row: Row) -> None:
    """Append a row as one line; half a surrogate pair, which UTF-8 lacks, is escaped as in JSON."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
