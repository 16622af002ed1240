"""Where the channels of a norm lie in a value, followed through operations that only move data.

A `ChannelMap` says: position i of `axis` carries channel index[i] of the norm (-1: none of them).

    flatten, view      the axis merges with its neighbours: each channel is repeated, or not
    permute, squeeze   the axis has another number
    pixel shuffle      r*r neighbouring channels become one, or the other way round

Each is followed both ways. A way that would need two maps for one channel is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Node

from rewrite.affine.channel_map import UNKNOWN_RANK, Refused, from_front
from rewrite.graph.arguments import argument
from rewrite.graph.captured import Captured
from rewrite.graph.ranks import Ranks
from rewrite.graph.spellings import function_name, is_getitem

if TYPE_CHECKING:
    from rewrite.affine.channel_map import ChannelMap


class Channels:
    """Follows lanes through the operations of one captured model that only move data."""

    def __init__(self, captured: Captured, ranks: Ranks) -> None:
        self._captured = captured
        self._ranks = ranks

    def follow(self, node: Node, lane: ChannelMap, backward: bool) -> ChannelMap | None:
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
        self, node: Node, source: Node, lane: ChannelMap, backward: bool, start: int, end: int
    ) -> ChannelMap:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(UNKNOWN_RANK.format(source.name))
        first, last = start % rank, end % rank
        flat_rank = rank - (last - first)
        if backward:
            axis = from_front(lane.axis, flat_rank)
            if axis < first:
                return lane.moved(axis - rank)
            if axis > first:
                return lane.moved(axis + (last - first) - rank)
            return self._unmerge(source, lane, first, last, rank)
        axis = from_front(lane.axis, rank)
        if axis < first:
            return lane.moved(axis - flat_rank)
        if axis > last:
            return lane.moved(axis - (last - first) - flat_rank)
        return self._merge(source, lane, axis, first, last, rank, flat_rank)

    def _merge(
        self,
        source: Node,
        lane: ChannelMap,
        axis: int,
        first: int,
        last: int,
        rank: int,
        flat_rank: int,
    ) -> ChannelMap:
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

    def _unmerge(
        self, source: Node, lane: ChannelMap, first: int, last: int, rank: int
    ) -> ChannelMap:
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

    def _only_axis(self, source: Node, lane: ChannelMap, labels: Tensor, first: int) -> ChannelMap:
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

    def _view(self, node: Node, source: Node, lane: ChannelMap, backward: bool) -> ChannelMap:
        if _flattens_from_one(node, source):
            return self._flatten(node, source, lane, backward, 1, -1)
        old, new = self._captured.shape(source), self._captured.shape(node)
        if old is None or new is None:
            raise Refused(
                f"how {node.name} views {source.name} is unknown without example inputs "
                "(pass example_inputs)"
            )
        given, wanted = (new, old) if backward else (old, new)
        axis = from_front(lane.axis, len(given))
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

    def _permute(
        self, source: Node, lane: ChannelMap, backward: bool, dims: tuple[Any, ...]
    ) -> ChannelMap:
        if not all(isinstance(dim, int) for dim in dims):
            raise Refused(f"the order of the axes of {source.name} is computed")
        rank = len(dims)
        order = [dim % rank for dim in dims]
        axis = from_front(lane.axis, rank)
        return lane.moved((order[axis] if backward else order.index(axis)) - rank)

    def _transpose(
        self, source: Node, lane: ChannelMap, backward: bool, one: int, other: int
    ) -> ChannelMap:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(UNKNOWN_RANK.format(source.name))
        swap = {one % rank: other % rank, other % rank: one % rank}
        axis = from_front(lane.axis, rank)
        return lane.moved(swap.get(axis, axis) - rank)

    def _unsqueeze(self, source: Node, lane: ChannelMap, backward: bool, dim: int) -> ChannelMap:
        rank = self._ranks.rank(source)
        if rank is None:
            raise Refused(UNKNOWN_RANK.format(source.name))
        new = dim % (rank + 1)
        if backward:
            axis = from_front(lane.axis, rank + 1)
            if axis == new:
                raise Refused(f"the channels are an axis that {source.name} does not have")
            return lane.moved((axis - (axis > new)) - rank)
        axis = from_front(lane.axis, rank)
        return lane.moved((axis + (axis >= new)) - (rank + 1))

    def _squeeze(
        self, source: Node, lane: ChannelMap, backward: bool, dims: tuple[Any, ...]
    ) -> ChannelMap:
        rank = self._ranks.rank(source)
        given = dims[0] if len(dims) == 1 else dims
        given = (given,) if isinstance(given, int) else tuple(given or ())
        if rank is None or not given:
            raise Refused(UNKNOWN_RANK.format(source.name))
        gone = {dim % rank for dim in given}
        if any(self._ranks.size(source, dim - rank) != 1 for dim in gone):
            raise Refused(f"whether {source.name} loses an axis is unknown (pass example_inputs)")
        kept = [axis for axis in range(rank) if axis not in gone]
        if backward:
            return lane.moved(kept[from_front(lane.axis, len(kept))] - rank)
        axis = from_front(lane.axis, rank)
        if axis in gone:
            raise Refused(f"the channels of {source.name} are squeezed away")
        return lane.moved(kept.index(axis) - len(kept))


def _shuffle(lane: ChannelMap, size: int, backward: bool) -> ChannelMap:
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
