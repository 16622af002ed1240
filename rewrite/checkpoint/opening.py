"""Open a MODEL reference, and refuse a file before torch is imported where that can be seen.

load = vet, then rewrite.checkpoint.load.load
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rewrite.checkpoint.vetting.vet import vet

if TYPE_CHECKING:
    import torch
    from torch import nn


def load(
    reference: str | os.PathLike[str],
    *,
    factory: str | None = None,
    trust: Sequence[str] = (),
    map_location: str | torch.device = "cpu",
    key: str | None = None,
    strip_prefix: str | None = None,
    seed: int | None = None,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Return the model that a MODEL reference names; see `rewrite.checkpoint.load`.

    Args:
        reference: A path or a name.
        factory: `package.module:callable[(json kwargs)]` that builds the model of a state dict.
            With it only tensors of the file matter: the rest is left alone, and said to `note`.
        trust: Packages (or full names of single classes and functions) that a file may name
            beside the listed classes of torch, torchvision, timm, transformers and rewrite. Naming
            a package allows its classes, and to import it.
        map_location: The device that the tensors of a file go to.
        key: Where in a training checkpoint the state dict (or module) is, as "generator".
        strip_prefix: What to take off the keys; by itself any prefix that makes all keys fit.
        seed: What a factory draws its weights from; None leaves PyTorch's generators as they are.
        note: Takes a line about each thing in the file that was left out or renamed.

    Raises:
        CheckpointError: The reference names nothing, or nothing that may be opened.
    """
    # With torch there already, nothing is saved by judging first what `load` judges again.
    if "torch" not in sys.modules and is_file(reference):
        vet(reference, factory=factory, trust=trust, key=key)
    from rewrite.checkpoint import load as opening

    return opening.load(
        reference, factory=factory, trust=trust, map_location=map_location, key=key,
        strip_prefix=strip_prefix, seed=seed, note=note or opening.silent,
    )  # fmt: skip


def is_file(reference: str | os.PathLike[str]) -> bool:
    """Say whether a reference is a file that exists."""
    try:
        return Path(reference).is_file()
    except (OSError, ValueError):
        return False
