"""Name the first of many: "conv1, conv2, conv3 and 12 more"."""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first few names in one line, and how many more there are."""
    first = ", ".join(names[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"
