"""What a mistyped name probably meant: the known names that are close to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    """Return "; did you mean this?" for the names that are close to `word`, "" without any."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(close)}?" if close else ""
