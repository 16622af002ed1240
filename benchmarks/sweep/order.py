"""The order of the full sweep: one architecture of every family first, large variants last."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest

_LARGE = re.compile(
    r"large|huge|giant|gigantic|xl|_l\b|_h\b|_so\d|_g\b|so400m|1202|1001|542|272|269|264|200|"
    r"152|128gf|_b[5-8]|_l2|384|448|512|768|1024"
)


def by_family(names: Iterable[str]) -> list[str]:
    """Return `names` in turns over families: the smallest of each, then the second, and so on."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in names:
        families[family(name)].append(name)
    for members in families.values():
        members.sort(key=lambda name: (bool(_LARGE.search(name)), len(name), name))
    turns = zip_longest(*families.values())
    ordered = [name for name in chain.from_iterable(turns) if name is not None]
    # Stable: the rest of the order is kept, and large variants come last.
    return sorted(ordered, key=lambda name: bool(_LARGE.search(name)))


def family(name: str) -> str:
    """Return the package and the module or the leading word of an architecture's name."""
    package, _, architecture = name.partition(":")
    if package == "timm":
        from timm.models._registry import _model_to_module

        return f"timm:{_model_to_module[architecture]}"
    if package == "smp":
        decoder, _, encoder = architecture.partition("/")
        return f"smp:{decoder}/{_letters(encoder)}"
    if package == "transformers":
        return name
    return f"{package}:{_letters(architecture)}"


def _letters(text: str) -> str:
    match = re.match(r"[A-Za-z]+(_?[A-Za-z]+)?", text)
    return match.group() if match else text
