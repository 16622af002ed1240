"""Labels through means, pooling, padding, and splits at places that only values know.

    mean over places    m(s . x + t) = s . m(x) + t       where s and t are the same at every place
    sum over places     s passes, t would be counted
    zeros beside        s . 0 = 0: s passes, t does not

A label has to be the same all along an axis that is reduced, padded or split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.graph.traits import argument, spelled
from rewrite.observe.spellings import op_name, shape_of

_POOLS = {"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3}

REDUCES: frozenset[str] = spelled("mean", "sum", "pad", "constant_pad_nd", *_POOLS)
"""Operators that `reduced` knows."""

_NO_SHIFT = spelled("sum", "pad", "constant_pad_nd")


class Mixed(Exception):  # noqa: N818 - a reason, caught where it is decided
    """Channels meet along an axis that is reduced."""


def reduced(node: Node, labels: Tensor) -> tuple[Tensor, bool]:
    """Return the labels of what `node` makes of a value, and whether a shift passes.

    Args:
        node: a call of one of `REDUCES`.
        labels: of its input.

    Raises:
        Mixed: elements with different labels meet, or what is padded is not zeros.
    """
    name = op_name(node)
    if name in ("mean", "sum"):
        dims = argument(node, 1, "dim")
        if not isinstance(dims, int | list | tuple):
            raise Mixed
        axes = [dims] if isinstance(dims, int) else list(dims)
        one = _one(labels, axes)
        if not argument(node, 2, "keepdim", False):
            one = one.squeeze(tuple(axes))
        return one, name not in _NO_SHIFT
    if name in _POOLS:
        shape = shape_of(node)
        one = _one(labels, list(range(-_POOLS[name], 0)))
        if shape is None:
            raise Mixed
        return one.expand(shape), True
    return _padded(node, labels)


def _padded(node: Node, labels: Tensor) -> tuple[Tensor, bool]:
    pads, shape = argument(node, 1, "pad"), shape_of(node)
    pads = pads if isinstance(pads, list | tuple) else []
    if not any(pads):
        return labels, True
    value = argument(node, 3 if op_name(node) == "pad" else 2, "value")
    mode = argument(node, 2, "mode", "constant") if op_name(node) == "pad" else "constant"
    if shape is None or mode != "constant" or value not in (None, 0, 0.0):
        raise Mixed
    axes = sorted({-1 - i // 2 for i, pad in enumerate(pads) if pad})
    return _one(labels, axes).expand(shape), False


def split_labels(labels: Tensor, axis: int, parts: int) -> list[Tensor]:
    """Return the labels of parts of unknown length: one place each, that stands for all.

    Raises:
        Mixed: labels differ along the axis.
    """
    return [_one(labels, [axis])] * parts


def is_split_by_values(node: Node) -> bool:
    """Return whether a call splits a value into parts whose lengths are computed."""
    sizes: Any = argument(node, 1, "split_sizes")
    computed = isinstance(sizes, list | tuple) and any(isinstance(s, Node) for s in sizes)
    return op_name(node) == "split_with_sizes" and computed


def _one(labels: Tensor, axes: Sequence[int]) -> Tensor:
    """Return the labels with one place on each of some axes, along which they are the same."""
    low = torch.amin(labels, dim=tuple(axes), keepdim=True)
    if not torch.equal(low, torch.amax(labels, dim=tuple(axes), keepdim=True)):
        raise Mixed
    return low
