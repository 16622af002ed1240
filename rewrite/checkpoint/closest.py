"""What a MODEL reference that leads nowhere probably meant: a file beside it, a library's model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from rewrite.text.suggest import did_you_mean

LIBRARIES = ("torchvision", "timm")
"""Packages whose models have names: `torchvision:resnet18`."""


def closest_reference(reference: str) -> str:
    """Return "; did you mean model.pt?" for a reference that is no file and no name, or "".

    Args:
        reference: what was given. A path is held to the files of its folder, a plain word to the
            models of torchvision and timm, where those are installed.
    """
    path = Path(reference)
    try:
        beside = {file.name: str(file) for file in path.parent.iterdir()}
    except (OSError, ValueError):
        beside = {}
    if hint := did_you_mean(path.name, beside, shown=beside):
        return hint
    if re.fullmatch(r"\w+", reference) is None:
        return ""
    having = [library for library in LIBRARIES if reference in _models(library)]
    return did_you_mean(reference, (f"{library}:{reference}" for library in having), cutoff=0.0)


def closest_model(library: str, name: str) -> str:
    """Return "; did you mean resnet18?" for a name that a library has no model of, or ""."""
    known = _models(library)
    return "" if name in known else did_you_mean(name, known)


def _models(library: str) -> Iterable[str]:
    if library not in LIBRARIES or find_spec(library) is None:
        return ()
    if library == "torchvision":
        from torchvision.models import list_models
    else:
        from timm import list_models
    return frozenset(list_models())
