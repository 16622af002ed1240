"""That each stored tensor is its exact value, rounded once: compared when that value is computed.

    stored = round(exact)       element by element, in blocks that stay in a processor's cache

A proof computes the exact values in float64 as it runs the new model; what it never computes is
computed at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rewrite.hub.folder import CheckpointFolder
from rewrite.weights.scaling import blocks
from rewrite.weights.tensor_recipe import Computed

_BLOCK = 1 << 16
"""Elements that are compared at a time."""


class StoredCheck:
    """Compares the tensors of a folder with what they were before they were rounded.

    Args:
        folder: the new folder.
        computed: how to compute each new tensor in float64, by its name there.

    Attributes:
        wrong: a line on each tensor that is not its exact value rounded.
    """

    def __init__(
        self, folder: CheckpointFolder, computed: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.wrong: list[str] = []
        self._folder, self._left = folder, dict(computed)

    def reader(self, name: str) -> Callable[[], Tensor] | None:
        """Return how to compute a new tensor, compared the first time; None for an old one."""
        compute = self._left.get(name)
        if compute is None:
            return None
        found = compute

        def read() -> Tensor:
            exact = found()
            self._compare(name, exact)
            return exact

        return read

    def rest(self) -> None:
        """Compare what nobody has computed so far."""
        for name, compute in list(self._left.items()):
            self._compare(name, compute())

    def _compare(self, name: str, exact: Tensor) -> None:
        compute = self._left.pop(name, None)
        if compute is None:
            return
        stored = self._folder.read(name)
        roundings = compute.roundings if isinstance(compute, Computed) else 0
        if _differ(stored, exact, roundings):
            of = f"its exact value rounded to {stored.dtype}"
            self.wrong.append(f"{name} is not {'what the model computes' if roundings else of}")


def _differ(stored: Tensor, exact: Tensor, roundings: int) -> bool:
    """Return whether a stored tensor is more than `roundings` of its own off the nearest values."""
    if stored.shape != exact.shape:
        return True
    for at in blocks(stored.shape, _BLOCK):
        part = tuple(slice(begin, begin + length) for begin, length in at)
        held, nearest = stored[part], exact[part].to(stored.dtype)
        if roundings:
            allowed = roundings * torch.finfo(stored.dtype).eps * nearest.abs()
            if not bool(((held - nearest).abs() <= allowed).all()):
                return True
        elif not torch.equal(held, nearest):
            return True
    return False
