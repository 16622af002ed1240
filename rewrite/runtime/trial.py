"""Run a model to see what it says: on a copy, so that nothing that its forward does remains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from rewrite.runtime.copying import copy_model
from rewrite.runtime.modes import evaluating, isolated


def expendable(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that may be run; the model itself where nothing can copy it."""
    try:
        return copy_model(model)
    except Exception:  # noqa: BLE001 - any class may forbid it, with any error
        return model


@contextlib.contextmanager
def trial(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of `model` in eval mode, whose buffers go back to what they were at the end.

    A model that nothing can copy (it holds an open file, a lock) is itself yielded so: what it
    appends to its own lists stays.
    """
    copied = expendable(model)
    with evaluating(copied), isolated(copied):
        yield copied
