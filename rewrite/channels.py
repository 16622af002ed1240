"""Where the channels of a norm lie in a value, followed through operations that only move data.

A `Lane` says: position i of `axis` carries channel index[i] of the norm (-1: none of them).

    flatten, view      the axis merges with its neighbours: each channel is repeated, or not
    permute, squeeze   the axis has another number
    pixel shuffle      r*r neighbouring channels become one, or the other way round
    slices, chunk      a part of the index; the rest of the source carries nothing
    cat                the parts one behind the other

Each is followed both ways. A way that would need two maps for one channel is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.capture import Captured
from rewrite.operators import function_name, is_getitem
from rewrite.ranks import Ranks, argument


class Refused(Exception):  # noqa: N818 - control flow inside the planner, never leaves it
    """A step that the algebra does not allow; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Lane:
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

    def same(self, other: Lane) -> bool:
        """Return whether both say the same."""
        return (
            self.axis == other.axis
            and self.scale == other.scale
            and self.shift == other.shift
            and self.spread == other.spread
            and torch.equal(self.index, other.index)
        )

    def moved(self, axis: int, index: Tensor | None = None) -> Lane:
        """Return the lane on another axis, or with another index."""
        return replace(self, axis=axis, index=self.index if index is None else index)


_UNKNOWN_RANK = "the number of axes of {0} is unknown without example inputs (pass example_inputs)"


class Channels:
    """Follows lanes through the operations of one captured model that only move data."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._captured = captured
        self._ranks = ranks

    def follow(self, node: Node, lane: Lane, backward: bool) -> Lane | None:
        """Return the lane at the input of `node` (backward) or at its value; None: not my kind.

        Raises:
            Refused: the operation mixes channels, or needs sizes that are unknown.
        """
        name, arguments = self._call(node)
        source = _source(node)
        if source is None:
            return None
        if name == "flatten":
            return self._flatten(node, source, lane, backward, *arguments)
        if name == "permute":
            return self._permute(source, lane, backward, arguments)
        if name == "transpose":
            return self._transpose(source, lane, backward, *arguments)
        if name == "pixel_shuffle":
            return _shuffle(lane, int(arguments[0]) ** 2, backward)
        if name == "pixel_unshuffle":
            return _shuffle(lane, int(arguments[0]) ** 2, not backward)
        if name == "unsqueeze":
            return self._unsqueeze(source, lane, backward, int(arguments[0]))
        if name == "squeeze":
            return self._squeeze(source, lane, backward, arguments)
        if name in ("view", "reshape", "reshape_as", "view_as"):
            return self._view(node, source, lane, backward)
        return None

    def _call(self, node: Node) -> tuple[str, tuple[Any, ...]]:
        """Return the plain name of the operation and its arguments behind the input."""
        if node.op == "call_module":
            module = self._captured.module(str(node.target))
            if type(module) is nn.Flatten:
                return "flatten", (module.start_dim, module.end_dim)
            if type(module) is nn.PixelShuffle:
                return "pixel_shuffle", (module.upscale_factor,)
            if type(module) is nn.PixelUnshuffle:
                return "pixel_unshuffle", (module.downscale_factor,)
            return "", ()
        name = function_name(node) or ""
        if name == "flatten":
            return name, (argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))
        if name in ("transpose", "swapaxes"):
            first = argument(node, 1, "dim0", argument(node, 1, "axis0"))
            return "transpose", (first, argument(node, 2, "dim1", argument(node, 2, "axis1")))
        if name == "permute":
            dims = argument(node, 1, "dims")
            return name, tuple(dims) if isinstance(dims, list | tuple) else node.args[1:]
        if name in ("pixel_shuffle", "pixel_unshuffle"):
            return name, (node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values())),)
        if name in ("unsqueeze", "squeeze") and "dim" in node.kwargs:
            return name, (node.kwargs["dim"],)
        return name, node.args[1:]

    # -- flatten and view ---------------------------------------------------------------------

    def _flatten(
        self, node: Node, source: Node, lane: Lane, backward: bool, start: int, end: int
    ) -> Lane:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(_UNKNOWN_RANK.format(source.name))
        first, last = start % rank, end % rank
        flat_rank = rank - (last - first)
        if backward:
            axis = _from_front(lane.axis, flat_rank)
            if axis < first:
                return lane.moved(axis - rank)
            if axis > first:
                return lane.moved(axis + (last - first) - rank)
            return self._unmerge(source, lane, first, last, rank)
        axis = _from_front(lane.axis, rank)
        if axis < first:
            return lane.moved(axis - flat_rank)
        if axis > last:
            return lane.moved(axis - (last - first) - flat_rank)
        return self._merge(source, lane, axis, first, last, rank, flat_rank)

    def _merge(
        self, source: Node, lane: Lane, axis: int, first: int, last: int, rank: int, flat_rank: int
    ) -> Lane:
        before = self._product(source, range(first, axis), rank)
        after = self._product(source, range(axis + 1, last + 1), rank)
        if before is None:
            raise Refused(f"the channels of {source.name} merge behind an axis of unknown length")
        if before == 0 or (first == 0 and axis > 0):
            raise Refused(f"the channels of {source.name} merge with its batch axis")
        index = lane.index.repeat(before)
        if after is None:
            if before != 1:
                raise Refused(f"the channels of {source.name} merge with axes of unknown length")
            return replace(lane.moved(first - flat_rank, index), spread=True)
        return lane.moved(first - flat_rank, index.repeat_interleave(after))

    def _unmerge(self, source: Node, lane: Lane, first: int, last: int, rank: int) -> Lane:
        """Find the one axis of `first` to `last` that carries channels, behind a flatten."""
        if lane.spread:
            raise Refused(f"the channels of {source.name} are merged twice")
        length = len(lane.index)
        # The usual case: the channels are the first of the merged axes.
        channels = self._ranks.size(source, first - rank)
        shape = self._captured.shape(source)
        if first == 0:
            raise Refused(f"the batch axis of {source.name} is merged into the channels")
        if channels is not None and channels and length % channels == 0:
            index = lane.index.view(channels, -1)
            if bool((index == index[:, :1]).all()):
                return lane.moved(first - rank, index[:, 0].contiguous())
        if shape is not None:
            labels = lane.index.view(tuple(shape[first : last + 1]))
            return self._only_axis(source, lane, labels, first - rank)
        if channels is None:
            raise Refused(f"the number of channels of {source.name} is unknown before the flatten")
        raise Refused(
            f"each channel of {source.name} spreads over {length // channels} features, and the "
            "norm maps each of those differently"
        )

    def _only_axis(self, source: Node, lane: Lane, labels: Tensor, first: int) -> Lane:
        """Return the lane on the only axis along which `labels` vary; their first is `first`."""
        varying = [
            axis
            for axis in range(labels.dim())
            if labels.shape[axis] > 1 and not bool((labels == labels.narrow(axis, 0, 1)).all())
        ]
        if len(varying) > 1:
            raise Refused(
                f"the norm maps the positions of {source.name} differently along "
                f"{len(varying)} axes, not per channel"
            )
        kept = varying[0] if varying else 0
        index = labels.movedim(kept, 0).reshape(labels.shape[kept], -1)[:, 0].contiguous()
        return lane.moved(first + kept, index)

    def _view(self, node: Node, source: Node, lane: Lane, backward: bool) -> Lane:
        if _flattens_from_one(node, source):
            return self._flatten(node, source, lane, backward, 1, -1)
        old, new = self._captured.shape(source), self._captured.shape(node)
        if old is None or new is None:
            raise Refused(
                f"how {node.name} views {source.name} is unknown without example inputs "
                "(pass example_inputs)"
            )
        given, wanted = (new, old) if backward else (old, new)
        axis = _from_front(lane.axis, len(given))
        if lane.spread:
            raise Refused(f"the channels of {source.name} are merged twice")
        trailing = len(given) - axis
        if len(wanted) >= trailing and tuple(given[axis:]) == tuple(wanted[-trailing:]):
            return lane.moved(-trailing)
        if axis == 0 or given[0] != wanted[0]:
            raise Refused(f"the view {node.name} mixes the channels with the batch axis")
        labels = lane.index.view(-1, *(1,) * (len(given) - axis - 1)).expand(tuple(given[1:]))
        return self._only_axis(source, lane, labels.reshape(tuple(wanted[1:])), 1 - len(wanted))

    def _product(self, source: Node, axes: range, rank: int) -> int | None:
        sizes = [self._ranks.size(source, axis - rank) for axis in axes]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    # -- the order of the axes ----------------------------------------------------------------

    def _permute(self, source: Node, lane: Lane, backward: bool, dims: tuple[Any, ...]) -> Lane:
        if not all(isinstance(dim, int) for dim in dims):
            raise Refused(f"the order of the axes of {source.name} is computed")
        rank = len(dims)
        order = [dim % rank for dim in dims]
        axis = _from_front(lane.axis, rank)
        return lane.moved((order[axis] if backward else order.index(axis)) - rank)

    def _transpose(self, source: Node, lane: Lane, backward: bool, one: int, other: int) -> Lane:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(_UNKNOWN_RANK.format(source.name))
        swap = {one % rank: other % rank, other % rank: one % rank}
        axis = _from_front(lane.axis, rank)
        return lane.moved(swap.get(axis, axis) - rank)

    def _unsqueeze(self, source: Node, lane: Lane, backward: bool, dim: int) -> Lane:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(_UNKNOWN_RANK.format(source.name))
        new = dim % (rank + 1)
        if backward:
            axis = _from_front(lane.axis, rank + 1)
            if axis == new:
                raise Refused(f"the channels are an axis that {source.name} does not have")
            return lane.moved((axis - (axis > new)) - rank)
        axis = _from_front(lane.axis, rank)
        return lane.moved((axis + (axis >= new)) - (rank + 1))

    def _squeeze(self, source: Node, lane: Lane, backward: bool, dims: tuple[Any, ...]) -> Lane:
        rank = self._ranks.rank(source)
        given = dims[0] if len(dims) == 1 else dims
        given = (given,) if isinstance(given, int) else tuple(given or ())
        if rank is None or not given:
            raise Refused(_UNKNOWN_RANK.format(source.name))
        gone = {dim % rank for dim in given}
        if any(self._ranks.size(source, dim - rank) != 1 for dim in gone):
            raise Refused(f"whether {source.name} loses an axis is unknown (pass example_inputs)")
        kept = [axis for axis in range(rank) if axis not in gone]
        if backward:
            return lane.moved(kept[_from_front(lane.axis, len(kept))] - rank)
        axis = _from_front(lane.axis, rank)
        if axis in gone:
            raise Refused(f"the channels of {source.name} are squeezed away")
        return lane.moved(kept.index(axis) - len(kept))

    # -- parts --------------------------------------------------------------------------------

    def part(self, node: Node, lane: Lane, backward: bool) -> Lane | None:
        """Follow an indexing or one result of a chunk or split; None if `node` is neither."""
        if not is_getitem(node) or not isinstance(node.args[0], Node):
            return None
        source, item = node.args[0], node.args[1]
        called = function_name(source)
        if called in ("chunk", "split", "tensor_split") and isinstance(item, int):
            return self._chunk(source, item, lane, backward)
        items = item if isinstance(item, tuple) else (item,)
        if any(isinstance(i, Node | list | Tensor) for i in items):
            raise Refused(f"{node.name} indexes {source.name} by a computed index")
        return self._slice(source, items, lane, backward)

    def _chunk(self, source: Node, item: int, lane: Lane, backward: bool) -> Lane:
        whole = source.args[0]
        assert isinstance(whole, Node)
        dim = argument(source, 2, "dim", 0)
        if not isinstance(dim, int):
            raise Refused(f"{source.name} splits along a computed axis")
        axis = self._ranks.from_end(whole, dim)
        if axis != lane.axis:
            if (axis < 0) != (lane.axis < 0):
                raise Refused(_UNKNOWN_RANK.format(whole.name))
            return lane
        total = self._ranks.size(whole, axis)
        if total is None:
            raise Refused(
                f"the number of channels of {whole.name} is unknown (pass example_inputs)"
            )
        start, stop = _bounds(source, total, item)
        if backward:
            index = torch.full((total,), -1)
            index[start:stop] = lane.index
            return lane.moved(axis, index)
        return lane.moved(axis, lane.index[start:stop])

    def _slice(self, source: Node, items: tuple[Any, ...], lane: Lane, backward: bool) -> Lane:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(_UNKNOWN_RANK.format(source.name))
        if Ellipsis in items:
            at = items.index(Ellipsis)
            used = sum(i is not None for i in items) - 1
            items = (*items[:at], *(slice(None),) * (rank - used), *items[at + 1 :])
        items = (*items, *(slice(None),) * (rank - sum(i is not None for i in items)))
        in_axis = 0
        out_axes: list[int | None] = []
        for item in items:
            if item is None:
                out_axes.append(None)
                continue
            if not isinstance(item, int):
                out_axes.append(in_axis)
            in_axis += 1
        axis = _from_front(lane.axis, len(out_axes) if backward else rank)
        in_front = out_axes[axis] if backward else axis
        if in_front is None or in_front not in out_axes:
            raise Refused(f"the channels of {source.name} are indexed away")
        window = [item for item in items if item is not None][in_front]
        if window == slice(None):
            length = len(lane.index)
        else:
            size = self._ranks.size(source, in_front - rank)
            if size is None:
                raise Refused(f"the number of channels of {source.name} is unknown")
            length = size
        positions = torch.arange(length)[window]
        if backward:
            index = torch.full((length,), -1)
            index[positions] = lane.index
            return lane.moved(in_front - rank, index)
        return lane.moved(out_axes.index(in_front) - len(out_axes), lane.index[positions])

    def join(self, node: Node) -> tuple[list[Node], int] | None:
        """Return the parts of a concatenation and its axis, or None if `node` is none."""
        if function_name(node) not in ("cat", "concat", "concatenate"):
            return None
        parts = argument(node, 0, "tensors")
        dim = argument(node, 1, "dim", argument(node, 1, "axis", 0))
        if not isinstance(parts, list | tuple) or not isinstance(dim, int):
            raise Refused(f"{node.name} concatenates what is computed")
        if not all(isinstance(part, Node) for part in parts):
            raise Refused(f"{node.name} concatenates something that is no value")
        return list(parts), self._ranks.from_end(node, dim)


def _bounds(source: Node, total: int, item: int) -> tuple[int, int]:
    """Return which positions the result `item` of a chunk or split covers."""
    given = source.args[1] if len(source.args) > 1 else next(
        (source.kwargs[k] for k in ("chunks", "split_size_or_sections", "split_size")
         if k in source.kwargs), None,
    )  # fmt: skip
    called = function_name(source)
    if isinstance(given, int) and called != "tensor_split":
        step = given if called == "split" else -(-total // given)
        sizes = [min(step, total - start) for start in range(0, total, step)]
    elif isinstance(given, list | tuple) and called == "split":
        if not all(isinstance(size, int) for size in given):
            raise Refused(f"{source.name} splits at computed positions")
        sizes = [int(size) for size in given]
    else:
        raise Refused(f"{source.name} splits at computed positions")
    item %= len(sizes)
    return sum(sizes[:item]), sum(sizes[: item + 1])


def _shuffle(lane: Lane, size: int, backward: bool) -> Lane:
    """Follow a pixel shuffle: `size` neighbouring channels become the pixels of one."""
    if lane.axis != -3:
        raise Refused("the channels are not the axis that a pixel shuffle takes apart")
    if backward:
        return lane.moved(-3, lane.index.repeat_interleave(size))
    if len(lane.index) % size:
        raise Refused("the channels do not fill the pixels of a pixel shuffle")
    index = lane.index.view(-1, size)
    if not bool((index == index[:, :1]).all()):
        raise Refused(
            f"a pixel shuffle makes one channel of {size}, and the norm maps those differently"
        )
    return lane.moved(-3, index[:, 0].contiguous())


def _source(node: Node) -> Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, Node) else None


def _from_front(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Refused("the channels are an axis that the value does not have")
    return axis % rank


def _flattens_from_one(node: Node, source: Node) -> bool:
    """Return whether a view is `x.view(x.size(0), -1)` in one of its spellings."""
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = tuple(sizes[0])
    if function_name(node) not in ("view", "reshape") or len(sizes) != 2 or sizes[1] != -1:
        return False
    return _is_batch_size(sizes[0], source)


def _is_batch_size(size: Any, source: Node) -> bool:
    if not isinstance(size, Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return size.args[0] is source and size.args[1:] == (0,)
    if is_getitem(size) and size.args[1] == 0:
        shape = size.args[0]
        if not isinstance(shape, Node):
            return False
        if shape.op == "call_method" and shape.target == "size":
            return shape.args == (source,)
        return (
            shape.op == "call_function"
            and shape.target is getattr
            and (shape.args == (source, "shape"))
        )
    return False
