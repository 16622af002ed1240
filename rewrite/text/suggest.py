"""What a mistyped name probably meant, and which package is missing: the end of an error line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(
    word: str, known: Iterable[str], cutoff: float = 0.7, shown: Mapping[str, str] | None = None
) -> str:
    """Return "; did you mean this?" for the names that are close to `word`, "" without any.

    Args:
        word: what was given.
        known: what there is.
        cutoff: how alike two names have to be, from 0 to 1.
        shown: how a name is written where that is not the name itself.
    """
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=cutoff)
    names = [name if shown is None else shown[name] for name in close]
    return f"; did you mean {' or '.join(names)}?" if close else ""


def how_to_install(error: BaseException) -> str:
    """Return "; pip install NAME" for a package that could not be imported, "" for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    package = error.name.partition(".")[0]
    if package in _NAMED_ALIKE:
        return f"; pip install {package}"
    return "; install the package that holds it"


_NAMED_ALIKE = frozenset({"diffusers", "peft", "timm", "torchvision", "transformers"})
"""Packages of models that an index knows by the name that they are imported by."""
