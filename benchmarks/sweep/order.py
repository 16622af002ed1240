"""The order of the full sweep: one architecture of every family first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest

from benchmarks import corpus

_LARGE = re.compile(
    r"large|huge|giant|gigantic|xl|_l\b|_h\b|_so\d|_g\b|so400m|1202|1001|542|272|269|264|200|"
    r"152|128gf|_b[5-8]|_l2|384|448|512|768|1024"
)


_DATASET = re.compile(r"_(cifar100|svhn|cub|ade20k|cityscapes|celebamaskhq)\b")


def everything(packages: Iterable[str]) -> list[str]:
    """Return every architecture of the packages that are installed, in the order of `by_family`."""
    present = filter(corpus.installed, packages)
    return by_family(chain.from_iterable(map(corpus.names, present)))


def by_family(names: Iterable[str]) -> list[str]:
    """Return `names` in turns over families: the smallest of each, then the second, and so on.

    Large variants and models without a norm of their own come after that, and last the same
    architectures for another dataset.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for name in names:
        families[family(name)].append(name)
    for members in families.values():
        members.sort(key=lambda name: (_lateness(name), len(name), name))
    turns = zip_longest(*families.values())
    ordered = [name for name in chain.from_iterable(turns) if name is not None]
    # Stable: the turns are kept within each of the three parts.
    return sorted(ordered, key=_lateness)


def _lateness(name: str) -> int:
    package, _, architecture = name.partition(":")
    if package == "transformers":
        from benchmarks.corpus.transformers_source import names_batch_norm

        return int(not names_batch_norm(architecture))
    return 2 if _DATASET.search(name) else int(bool(_LARGE.search(name)))


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
