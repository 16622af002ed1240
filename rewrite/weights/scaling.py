"""A tensor times a vector along one axis, block by block, in the least arithmetic that is the same.

    y[.., i, ..] = round(x[.., i, ..] * s[i])

If x and s fit into float32 (24 significant bits), x * s is exact in float64 (48 <= 53 bits, and no
exponent leaves its range), and what rounds it to float32 is the product of float32 itself. torch
rounds float64 to bfloat16 and float16 by way of float32, so the product in float32, rounded to the
type of x, is the product in float64, rounded to that type, bit for bit: infinities and subnormal
numbers included. A vector that fits into the type of x is multiplied in that type, which torch does
in float32 as well. Any other vector is multiplied in float64.

Of two numbers of bfloat16 (8 bits) or float16 (11 bits) the product is exact in float32 where it is
a normal number, and so is rounded once. One with a vector of 24 bits is rounded to float32 first:
within 2**-14 of a last place of the middle of two neighbours it may end at the farther of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 1 << 15
"""Elements that are multiplied at a time: what is computed with stays in a processor's cache."""

Range = tuple[int, int]
"""Begin and length along one axis."""

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Scaling:
    """A vector that multiplies a tensor along an axis, in the whole of it or in a part.

    Attributes:
        vector: in float64, as long as that axis.
        axis: of the tensor.
        parts: (axis, begin, length): what is multiplied; of any other axis, all.
    """

    vector: Tensor
    axis: int
    parts: tuple[tuple[int, int, int], ...] = ()

    def between(self, old: torch.dtype, new: torch.dtype) -> Scaling:
        """Return the same in the narrowest type that gives the same bits, for `old` to `new`."""
        if old not in _NARROW or new not in _NARROW:
            return self
        for dtype in dict.fromkeys((new if old == new else torch.float32, torch.float32)):
            narrow = self.vector.to(dtype)
            if torch.equal(narrow.double(), self.vector):
                return replace(self, vector=narrow)
        return self

    def __call__(self, old: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the product as a new tensor of a type."""
        new = torch.empty_like(old, dtype=dtype)
        whole = [(0, size) for size in old.shape]
        self.between(old.dtype, dtype).fill(new, old, whole)
        return new

    def fill(
        self,
        new: Tensor,
        old: Tensor,
        at: Sequence[Range],
        check: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Write into `new` the product of `old`, a part of the tensor, block by block.

        Args:
            new, old: of one shape.
            at: where the part is in the tensor, by axis.
            check: is given each block of the product, and raises where that may not be.
        """
        for block in blocks(old.shape, BLOCK):
            place = [(outer + begin, n) for (outer, _), (begin, n) in zip(at, block, strict=True)]
            product = _part(new, block)
            self._fill_block(product, _part(old, block), place)
            if check is not None:
                check(product)

    def _fill_block(self, new: Tensor, old: Tensor, at: Sequence[Range]) -> None:
        vector = self.vector.narrow(0, *at[self.axis])
        vector = vector.reshape([-1 if axis == self.axis else 1 for axis in range(old.ndim)])
        if not self.parts:
            _multiply(new, old, vector)
            return
        new.copy_(old)
        for axis, begin, length in self.parts:
            first = max(begin, at[axis][0])
            inside = min(begin + length, sum(at[axis])) - first
            if inside <= 0:
                return
            place = (axis, first - at[axis][0], inside)
            new, old = new.narrow(*place), old.narrow(*place)
        _multiply(new, old, vector)


def _multiply(new: Tensor, old: Tensor, vector: Tensor) -> None:
    if vector.dtype == old.dtype == new.dtype:
        torch.mul(old, vector, out=new)
    elif vector.dtype == new.dtype:
        new.copy_(old).mul_(vector)
    else:
        new.copy_(old.to(vector.dtype).mul_(vector))


def blocks(shape: Sequence[int], most: int) -> Iterator[tuple[Range, ...]]:
    """Yield the ranges of blocks of a tensor, each of which lies in one piece, in their order.

    Args:
        shape: of the tensor.
        most: how many elements a block may have.
    """
    if not shape:
        yield ()
        return
    rest = math.prod(shape[1:])
    if rest > most:
        for index in range(shape[0]):
            for inner in blocks(shape[1:], most):
                yield ((index, 1), *inner)
        return
    whole = tuple((0, size) for size in shape[1:])
    step = max(1, most // max(1, rest))
    for begin in range(0, shape[0], step):
        yield ((begin, min(step, shape[0] - begin)), *whole)


def _part(tensor: Tensor, at: Sequence[Range]) -> Tensor:
    for axis, (begin, length) in enumerate(at):
        if length != tensor.shape[axis]:
            tensor = tensor.narrow(axis, begin, length)
    return tensor
