"""What a call that writes in place writes into, and the call that computes the same anew.

    x.f_(…), torch.f_(x, …), F.f(x, …, inplace=True)     f(x, …)
    x += y, operator.iadd(x, y)                          x + y
    torch.f(…, out=x)                                    f(…)
    x.zero_(), x.fill_(v), x.copy_(y)                    fill(x, 0), fill(x, v), where(true, y, x)
    x[i, a:b] = y                                        select_scatter, slice_scatter
    x[:, i] = y for places i                             index_copy
    x[mask] = 1                                          masked_fill
    x[mask] = y, x[indices] = y                          index_put

An operation in place keeps the dtype of x; where the new value would have another one it is cast.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from rewrite.graph.effects import recorded

_NO_WRITE = frozenset({"requires_grad_", "retain_grad_", "share_memory_", "is_", "add_module_"})

_RANDOM = frozenset(
    {"bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_", "cauchy_",
     "log_normal_", "dropout_", "rrelu_", "alpha_dropout_"}
)  # fmt: skip

_STORAGE = frozenset({"set_", "resize_", "resize_as_", "data_", "swap_tensors_", "rename_"})

Make = Callable[[Graph, Node], Node]
"""Given a graph that is open before a line, and the line: the node that computes its value anew."""


def written(node: Node) -> Node | None:
    """Return the value that `node` writes into by its spelling, or None. `x += y` has none."""
    if node.op == "call_method":
        name = str(node.target)
        writes = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE
        return _first(node) if writes else None
    if node.op != "call_function":
        return None
    if isinstance(out := node.kwargs.get("out"), Node):
        return out
    if recorded(node.target) is not node.target or node.target is operator.setitem:
        return _first(node)
    name = _spelled(node)
    if name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE:
        return _first(node)
    return _first(node) if _inplace_argument(node) else None


def functional(node: Node, calls: Sequence[Node] = ()) -> Make | str:
    """Return what makes the value of `node` anew, or why there is nothing that does.

    Args:
        node: a call that writes in place.
        calls: all calls that its line makes, `node` among them; the new line has to suit each.
    """
    name = str(node.target) if node.op == "call_method" else _spelled(node)
    if name in _RANDOM:
        return f"{name} draws random numbers: a new draw would be another"
    if name in _STORAGE:
        return f"{name} changes the tensor itself, not its values"
    if node.target is operator.setitem:
        return _assignment(node, calls or (node,))
    if name in ("zero_", "fill_", "copy_"):
        return _filled(name)
    if node.op == "call_method":
        plain = name.rstrip("_")
        if not hasattr(torch.Tensor, plain):
            return f"{name} has no form that returns a new tensor"
        return lambda graph, line: graph.call_method(plain, line.args, line.kwargs)
    if isinstance(node.kwargs.get("out"), Node):
        return _without_out
    if recorded(node.target) is not node.target:
        return same
    if _inplace_argument(node):
        return _without_inplace
    target = _plain_function(node.target)
    if target is None:
        return f"{name} has no form that returns a new tensor"
    return lambda graph, line: graph.call_function(target, line.args, line.kwargs)


def same(graph: Graph, line: Node) -> Node:
    """Compute `line` as it stands: a trace has mostly made `x += y` into `x + y` already."""
    return graph.create_node(line.op, recorded(line.target), line.args, line.kwargs)


def cast(make: Make, dtype: torch.dtype) -> Make:
    """Return `make`, with its value cast to the dtype that the memory keeps."""

    def casting(graph: Graph, line: Node) -> Node:
        return graph.call_method("to", (make(graph, line), dtype))

    return casting


# -- forms ------------------------------------------------------------------------------------


def _filled(name: str) -> Make:
    def make(graph: Graph, line: Node) -> Node:
        old, *rest = line.args
        if name == "zero_":
            return _all(graph, old, 0)
        return _all(graph, old, rest[0] if rest else next(iter(line.kwargs.values())))

    return make


def _all(graph: Graph, old: Any, value: Any) -> Node:
    """Return `old` with every value replaced: its shape and dtype stay, and a gradient of zero."""
    if not isinstance(value, Node):
        return graph.call_function(torch.fill, (old, value))
    everywhere = graph.call_function(torch.ones_like, (old,), {"dtype": torch.bool})
    chosen = graph.call_function(torch.where, (everywhere, value, old))
    return graph.call_method("type_as", (chosen, old))


def _without_out(graph: Graph, line: Node) -> Node:
    kwargs = {key: value for key, value in line.kwargs.items() if key != "out"}
    return graph.create_node(line.op, line.target, line.args, kwargs)


def _without_inplace(graph: Graph, line: Node) -> Node:
    kwargs = {key: value for key, value in line.kwargs.items() if key != "inplace"}
    args = list(line.args)
    place = _place_of_inplace(line.target)
    if place is not None and len(args) > place:
        args[place] = False
    return graph.create_node(line.op, line.target, tuple(args), kwargs)


def _assignment(node: Node, calls: Sequence[Node]) -> Make | str:
    key = node.args[1]
    keys = list(key) if isinstance(key, tuple) else [key]
    if all(_is_full_mask(call) for call in calls):
        return lambda graph, line: graph.call_function(torch.masked_fill, line.args)
    if all(isinstance(k, Node) for k in keys):
        return lambda graph, line: _put(graph, line)
    if any(k is None or isinstance(k, bool) for k in keys):
        return "assigns through an index with new axes"
    for k in keys:
        if isinstance(k, Node) and not (_rank(k) == 1 and _dtype(k) == torch.long):
            return "assigns through an index that mixes slices and tensors, not all 1-D of int64"
    if any(isinstance(k, list) and not _are_apart(k) for k in keys):
        return "assigns to one place of an axis more than once, or may"
    several = [k for k in keys if isinstance(k, Node | list)]
    if several and (len(several) > 1 or any(isinstance(k, int) for k in keys)):
        return "assigns through an index of several places along more than one axis"
    return lambda graph, line: _scatter(graph, line.args[0], _keys(line), 0, line.args[2])


def _are_apart(places: list[Any]) -> bool:
    """Return whether places differ on an axis of any length: 3 and -1 are one where it has four.

    At a place that is assigned twice the last value stays, but the gradient reaches both.
    """
    signs = {place < 0 for place in places if isinstance(place, int)}
    return len(signs) <= 1 and len(set(places)) == len(places)


def _is_full_mask(call: Node) -> bool:
    """Return whether a call is x[mask] = number, with a mask of the rank of x."""
    old, key, value = call.args
    masks = isinstance(key, Node) and _dtype(key) == torch.bool
    return masks and isinstance(value, bool | int | float) and _rank(key) == _rank(old) is not None


def _keys(line: Node) -> list[Any]:
    key = line.args[1]
    return list(key) if isinstance(key, tuple) else [key]


def _rank(value: Any) -> int | None:
    known = value.meta.get("val") if isinstance(value, Node) else None
    return known.dim() if isinstance(known, torch.Tensor) else None


def _dtype(value: Node) -> torch.dtype | None:
    known = value.meta.get("val")
    return known.dtype if isinstance(known, torch.Tensor) else None


def _put(graph: Graph, line: Node) -> Node:
    old, key, value = line.args
    keys = key if isinstance(key, tuple) else (key,)
    if not isinstance(value, Node):
        value = graph.call_method("new_full", (old, (), value))
    value = graph.call_method("type_as", (value, old))
    return graph.call_function(torch.index_put, (old, keys, value))


def _scatter(graph: Graph, old: Any, keys: list[Any], dim: int, value: Any) -> Node:
    """Return `old` with `old[keys]` replaced, index by index from axis `dim` on.

    Behind an ellipsis axes are counted from the last one, so that the rank does not matter.
    """
    if keys and keys[0] is Ellipsis:
        keys = keys[1:]
        dim = -len(keys)
    if not keys:
        return _all(graph, old, value)
    key, *rest = keys
    if isinstance(key, slice) and key == slice(None):
        return _scatter(graph, old, rest, dim + 1, value)
    if isinstance(key, int):
        part = graph.call_method("select", (old, dim, key))
        new = _scatter(graph, part, rest, dim if dim >= 0 else dim + 1, value)
        return graph.call_function(torch.select_scatter, (old, new, dim, key))
    around = (slice(None),)
    index = (*around * dim, key) if dim >= 0 else (Ellipsis, key, *around * (-dim - 1))
    part = graph.call_function(operator.getitem, (old, index))
    new = _scatter(graph, part, rest, dim + 1, value)
    if isinstance(key, slice):
        bounds = _bounds(graph, old, part, key, dim)
        return graph.call_function(torch.slice_scatter, (old, new, dim, *bounds))
    if isinstance(key, Node):
        return graph.call_function(torch.index_copy, (old, dim, key, new))
    for number, one in enumerate(key):
        entry = graph.call_method("select", (new, dim, number))
        old = graph.call_function(torch.select_scatter, (old, entry, dim, one))
    return old  # type: ignore[no-any-return]  # a node, which is untyped here


def _bounds(graph: Graph, old: Any, part: Node, key: slice, dim: int) -> tuple[Any, Any, int]:
    """Return where a slice of `old` begins, where it ends, and its step, none counted from the end.

    `torch.func.vmap` takes no bounds of `slice_scatter` that are negative or beyond the axis.
    """
    step = 1 if key.step is None else key.step
    start, stop = key.start, key.stop
    if isinstance(start, int) and start < 0:
        start = graph.call_function(operator.add, (graph.call_method("size", (old, dim)), start))
        start = graph.call_function(max, (start, 0))
    if stop is not None or isinstance(start, Node):
        stop = graph.call_method("size", (part, dim))
        stop = stop if step == 1 else graph.call_function(operator.mul, (stop, step))
        stop = stop if start in (None, 0) else graph.call_function(operator.add, (stop, start))
    return start, stop, step


# -- spellings --------------------------------------------------------------------------------


def _first(node: Node) -> Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return first if isinstance(first, Node) else None


def _spelled(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", ""))


def _inplace_argument(node: Node) -> bool:
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    place = _place_of_inplace(node.target)
    return place is not None and len(node.args) > place and node.args[place] is True


def _place_of_inplace(target: Any) -> int | None:
    if not str(getattr(target, "__module__", "")).startswith("torch.nn.functional"):
        return None
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _plain_function(target: Any) -> Any:
    """Return the function of the same name without its underscore, from where `target` is."""
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, target.overloadpacket.__name__.rstrip("_"), None)
        overload = getattr(packet, target._overloadname, None)
        return overload if target.namespace == "aten" else None
    name = str(getattr(target, "__name__", "")).rstrip("_")
    for holder in (torch, F):
        if getattr(holder, f"{name}_", None) is target:
            return getattr(holder, name, None)
    return None
