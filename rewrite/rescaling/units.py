"""Sets of channels that share one scale, each with the reason why it has to stay, if any."""

from __future__ import annotations

import torch
from torch import Tensor


class Units:
    """Labels of channels, united as it is found that they share a scale.

    A label is an integer; the united ones have one root. A root may be fixed: its scale is 1.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Return labels of channels that nothing is known of, int64."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """Return the root of a label."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """Return the roots of many labels."""
        return torch.tensor([self.root(label) for label in labels.tolist()], dtype=torch.int64)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Let each channel of one value share the scale of the other's at its position."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parents[b] = a
                if (reason := self._reasons.pop(b, None)) is not None:
                    self._reasons.setdefault(a, reason)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Let the scales of channels be 1; the first reason is kept."""
        for label in set(labels.tolist()):
            self._reasons.setdefault(self.root(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why the scale of a label is 1, or None if it is free."""
        return self._reasons.get(self.root(label))
