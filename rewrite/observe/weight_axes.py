"""Which axis of a parameter an axis of an operand is, through operations that only select.

    W                  axes (0, 1)              Wᵀ       axes (1, 0)
    W[experts]         axes (-, 1, 2)           split    rows 0..e, e..3e of axis 0

Followed structurally, not by values: a weight of any size costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from rewrite.graph.traits import argument
from rewrite.observe.spellings import FORM, SAME, op_name, shape_of


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter, or a part of it: `length` places from `start` on."""

    axis: int
    start: int
    length: int


Axes = tuple[Axis | None, ...]
"""Per axis of an operand, the axis of the parameter that it is; None for any other."""


@dataclass(frozen=True)
class Operand:
    """A value that is a parameter but for the order and the range of its axes."""

    node: Node
    axes: Axes
    dropped: tuple[Axis, ...] = ()

    def part(self, axis: int) -> tuple[Axis, ...]:
        """Return the axes, other than `axis`, of which only a part is in this operand."""
        return tuple(a for a in (*self.axes, *self.dropped) if a is not None and a.axis != axis)


def operands_of(placeholder: Node) -> Iterator[tuple[Node, Operand]]:
    """Yield (reader, operand) for each call that computes with a parameter."""
    shape = shape_of(placeholder)
    if shape is None:
        return
    start = Operand(placeholder, tuple(Axis(i, 0, size) for i, size in enumerate(shape)))
    pending = [start]
    while pending:
        operand = pending.pop()
        for user in operand.node.users:
            if op_name(user) in FORM:
                continue
            moved = list(_moved(operand, user))
            if moved:
                pending.extend(moved)
            else:
                yield user, operand


def _moved(operand: Operand, user: Node) -> Iterator[Operand]:
    """Yield what `user` makes of an operand; nothing if it computes with it."""
    name, axes = op_name(user), list(operand.axes)
    if user.op != "call_function" or user.args[:1] != (operand.node,):
        return
    if name in SAME:
        yield replace(operand, node=user)
    elif name in ("t", "numpy_T", "mT") and len(axes) >= 2:
        axes[-1], axes[-2] = axes[-2], axes[-1]
        yield replace(operand, node=user, axes=tuple(axes))
    elif name in ("transpose", "swapaxes", "swapdims"):
        i, j = argument(user, 1, "dim0"), argument(user, 2, "dim1")
        axes[i], axes[j] = axes[j], axes[i]
        yield replace(operand, node=user, axes=tuple(axes))
    elif name == "permute":
        yield replace(operand, node=user, axes=tuple(axes[i] for i in user.args[1]))  # type: ignore[union-attr,index]  # by the operator's schema
    elif name == "unsqueeze":
        place = argument(user, 1, "dim") % (len(axes) + 1)
        yield replace(operand, node=user, axes=(*axes[:place], None, *axes[place:]))
    elif name in ("slice", "narrow"):
        yield from _slice(operand, user)
    elif name == "select":
        place, index = argument(user, 1, "dim") % len(axes), argument(user, 2, "index")
        axis = axes.pop(place)
        if axis is not None and isinstance(index, int):
            one = Axis(axis.axis, axis.start + index % axis.length, 1)
            yield Operand(user, tuple(axes), (*operand.dropped, one))
    elif name in ("split", "split_with_sizes", "chunk", "unbind"):
        yield from _split(operand, user)
    elif name in ("index", "index_select") and name == "index":
        indices = user.args[1]
        if isinstance(indices, list | tuple) and len(indices) == 1 and isinstance(indices[0], Node):
            shape = shape_of(indices[0])
            if shape is not None:
                yield replace(operand, node=user, axes=(*(None,) * len(shape), *axes[1:]))


def _slice(operand: Operand, user: Node) -> Iterator[Operand]:
    axes = list(operand.axes)
    place = argument(user, 1, "dim", 0) % len(axes)
    axis = axes[place]
    if axis is None:
        return
    if op_name(user) == "narrow":
        begin, length = argument(user, 2, "start"), argument(user, 3, "length")
        end = begin + length if isinstance(begin, int) and isinstance(length, int) else None
    else:
        begin, end = argument(user, 2, "start", 0) or 0, argument(user, 3, "end")
        end = axis.length if end is None else end
        if argument(user, 4, "step", 1) != 1:
            return
    if not isinstance(begin, int) or not isinstance(end, int):
        return
    begin, end, _ = slice(begin, end).indices(axis.length)
    axes[place] = Axis(axis.axis, axis.start + begin, end - begin)
    yield replace(operand, node=user, axes=tuple(axes))


def _split(operand: Operand, user: Node) -> Iterator[Operand]:
    if any(op_name(item) != "getitem" for item in user.users):
        return
    name = op_name(user)
    place = argument(user, 1 if name == "unbind" else 2, "dim", 0) % len(operand.axes)
    axis = operand.axes[place]
    if axis is None:
        return
    values = user.meta.get("val")
    if not isinstance(values, list | tuple):
        return
    sizes = [1 if name == "unbind" else int(v.shape[place]) for v in values]
    for item in user.users:
        index = item.args[1]
        assert isinstance(index, int)
        index %= len(sizes)
        part = Axis(axis.axis, axis.start + sum(sizes[:index]), sizes[index])
        axes = list(operand.axes)
        if name == "unbind":
            axes.pop(place)
            yield Operand(item, tuple(axes), (*operand.dropped, part))
        else:
            axes[place] = part
            yield replace(operand, node=item, axes=tuple(axes))
