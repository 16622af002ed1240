"""The anchor: the dial between a sample's own statistics and the function that was learned.

Let z be a standardized channel (its statistics are in the layer before it), m and v the mean and
variance of its group in one sample. A GroupNorm with eps = B² and weight γ √(1 + B²) computes

    y = γ √(1 + B²) (z − m) / √(v + B²) + β

    B = 0        GroupNorm:  y = γ (z − m) / √v + β
    B → ∞        y = γ (z − m) + β: the old function, but for the mean m of the group

since √((1 + B²) / (v + B²)) = 1 + (1 − v) / 2B² + …: at B = 3 a group of twice the usual variance
moves y by 5 %, at B = 30 by 0.06 %. Nothing is added to the values and taken away again, so that
float16 and float32 keep their precision at any B. The same holds for LayerNorm and InstanceNorm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.runtime.tree import Tree

AnchoredNorm = nn.GroupNorm | nn.LayerNorm | nn.modules.instancenorm._InstanceNorm


_LARGEST = 1e30


_ROOM = 16
"""How far below the largest number of a dtype the weight and eps of an anchored norm stay."""


def gain(anchor: float) -> float:
    """Return what an anchor multiplies the weight by: √(1 + B²)."""
    return math.sqrt(1 + anchor * anchor)


def largest_anchor(weight: torch.Tensor, anchor: float) -> float:
    """Return `anchor`, or the largest one below it whose weight and eps fit the weight's dtype."""
    room = min(torch.finfo(weight.dtype).max / _ROOM, _LARGEST)
    largest = float(weight.detach().abs().max()) if weight.numel() and not weight.is_meta else 0.0
    limit = math.sqrt(room)
    if largest > 0:
        limit = min(limit, math.sqrt(max((room / largest) ** 2 - 1, 0.0)))
    return min(anchor, limit)


def anchored_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every norm whose eps is larger than any plain one's, by name."""
    for name, module in Tree(model).modules():
        if isinstance(module, AnchoredNorm) and module.weight is not None and module.eps > 0.01:
            yield name, module


class Recentering:
    """Let the anchor of every norm of a model go, over a number of training steps.

    Call it once after each step of the optimizer. The anchor falls to zero geometrically; each
    weight shrinks with it, so that a group of the usual variance keeps its output.

    Args:
        model: a converted model.
        steps: after how many calls the norms are plain ones.
        eps: their eps at the end.
    """

    def __init__(self, model: nn.Module, steps: int, eps: float = 1e-5) -> None:
        if steps < 1:
            raise OptionError(f"recentering takes {steps} steps; pass 1 or more")
        self._norms = [(module, float(module.eps)) for _, module in anchored_norms(model)]  # type: ignore[arg-type]  # the float of a norm, for nn.Module a Tensor or a Module
        self._steps, self._eps, self._done = steps, eps, 0

    def __call__(self) -> None:
        """Lower every anchor by one step."""
        if self._done >= self._steps:
            return
        self._done += 1
        for module, first in self._norms:
            after = self._at(first)
            assert isinstance(module.weight, torch.Tensor)
            with torch.no_grad():
                module.weight.mul_(math.sqrt((1 + after) / (1 + float(module.eps))))  # type: ignore[arg-type]  # the float of a norm, for nn.Module a Tensor or a Module
            module.eps = after  # type: ignore[assignment]  # the float of a norm, for nn.Module a Tensor or a Module

    @property
    def done(self) -> int:
        """How many steps it has taken."""
        return self._done

    def resume(self, done: int) -> None:
        """Go on after `done` steps, with weights that have taken them already."""
        self._done = min(done, self._steps)
        for module, first in self._norms:
            module.eps = self._at(first)  # type: ignore[assignment]  # the float of a norm, for nn.Module a Tensor or a Module

    def _at(self, first: float) -> float:
        part = self._done / self._steps
        return float(first ** (1 - part) * self._eps**part)
