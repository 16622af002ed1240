"""Where the channels of a value lie: on which axis, in which order, in blocks of which size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Refused(Exception):  # noqa: N818 - control flow inside the planner, never leaves it
    """A step that the algebra does not allow; the message is the reason."""


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """Where channels lie in a value, and which part of their map the value takes.

    Attributes:
        axis: counted from the end (from the front only where the rank is unknown).
        index: per position of the axis, the channel of the norm, or -1.
        scale, shift: whether the value is multiplied, and whether something is added to it.
        spread: each channel stands for an unknown number of neighbouring positions.
    """

    axis: int
    index: Tensor
    scale: bool = True
    shift: bool = True
    spread: bool = False

    @property
    def trivial(self) -> bool:
        """Whether nothing happens to the value."""
        return not (self.scale or self.shift) or bool((self.index < 0).all())

    def same(self, other: ChannelMap) -> bool:
        """Return whether both say the same."""
        return (
            self.axis == other.axis
            and self.scale == other.scale
            and self.shift == other.shift
            and self.spread == other.spread
            and torch.equal(self.index, other.index)
        )

    def moved(self, axis: int, index: Tensor | None = None) -> ChannelMap:
        """Return the lane on another axis, or with another index."""
        return replace(self, axis=axis, index=self.index if index is None else index)


UNKNOWN_RANK = "the number of axes of {0} is unknown without example inputs (pass example_inputs)"


def from_front(axis: int, rank: int) -> int:
    """Return an axis counted from the front.

    Raises:
        Refused: the value has no such axis.
    """
    if not -rank <= axis < rank:
        raise Refused("the channels are an axis that the value does not have")
    return axis % rank
