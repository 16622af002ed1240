"""Where the channels of a value lie: on which axis, in which order, in blocks of which size."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewrite.outcomes import Declined

if TYPE_CHECKING:
    from torch.fx import Node


class DeclinedError(Exception):
    """A step that the algebra does not allow: it unwinds a propagation and never leaves it."""

    def __init__(self, reason: str, *nodes: Node) -> None:
        super().__init__(reason)
        self.declined = Declined(reason, nodes)


class Direction(enum.Enum):
    """Which way a map moves: with the data, or against it."""

    FORWARD = enum.auto()
    """From what an operation reads to its value."""
    BACKWARD = enum.auto()
    """From the value of an operation to what it reads."""


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

    @cached_property
    def trivial(self) -> bool:
        """Whether nothing happens to the value."""
        if not (self.scale or self.shift) or not self.index.numel():
            return True
        return int(self.index[0]) < 0 and int(self.index.max()) < 0  # the first mostly decides

    def same(self, other: ChannelMap) -> bool:
        """Return whether both say the same."""
        return (
            self.axis == other.axis
            and self.scale == other.scale
            and self.shift == other.shift
            and self.spread == other.spread
            and (self.index is other.index or torch.equal(self.index, other.index))
        )

    def moved(self, axis: int, index: Tensor | None = None) -> ChannelMap:
        """Return the map on another axis, or with another index."""
        index = self.index if index is None else index
        return ChannelMap(axis, index, self.scale, self.shift, self.spread)


UNKNOWN_RANK = "the number of axes of {0} is unknown without example inputs (pass example_inputs)"


def from_front(axis: int, rank: int) -> int:
    """Return an axis counted from the front.

    Raises:
        DeclinedError: the value has no such axis.
    """
    if not -rank <= axis < rank:
        raise DeclinedError("the channels are an axis that the value does not have")
    return axis % rank
