"""Norms over the last axis in an exported call, each as one operation with its input.

    layer    w (x - mean(x)) / sqrt(var(x) + eps) + b        aten.layer_norm
    rms      (a.w + c) x / sqrt(mean(x^2) + eps) + b         aten.rms_norm, or written out

A norm that is written out is recognized by its whole formula: what else reads a part of it makes it
no norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from rewrite.graph.traits import argument
from rewrite.observe.export import ObservedCall
from rewrite.observe.norms import Expression, expression_of
from rewrite.observe.spellings import FORM, SAME, number, op_name, shape_of


@dataclass(frozen=True, eq=False)
class NormCall:
    """One call of a norm.

    Attributes:
        node: its value, scaled and shifted if it is.
        value: what it normalizes.
        kind: "layer" or "rms".
        channels: how many it normalizes over: the last axis.
        weight: what it multiplies by, if anything.
        bias: the parameter that it adds, if any.
        inside: the nodes between the two, `node` included.
    """

    node: Node
    value: Node
    kind: str
    channels: int
    weight: Expression | None
    bias: Expression | None
    inside: frozenset[Node]


def norm_calls(observed: ObservedCall) -> Iterator[NormCall]:
    """Yield every norm of a call, in data-flow order."""
    for node in observed.graph.nodes:
        name = op_name(node)
        found = None
        if name in ("layer_norm", "rms_norm"):
            found = _whole(observed, node, "rms" if name == "rms_norm" else "layer")
        elif name in ("mul", "multiply", "div", "true_divide"):
            found = _written_out(observed, node)
        if found is not None:
            yield found


def _whole(observed: ObservedCall, node: Node, kind: str) -> NormCall | None:
    value, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    given = argument(node, 2, "weight"), None if kind == "rms" else argument(node, 3, "bias")
    weight, bias = (expression_of(observed, item) for item in given)
    missing = [g for g, e in zip(given, (weight, bias), strict=True) if g is not None and e is None]
    if missing or not isinstance(shape, list | tuple) or len(shape) != 1:
        return None
    if not isinstance(value, Node) or not isinstance(shape[0], int):
        return None
    return NormCall(node, value, kind, shape[0], weight, bias, frozenset({node}))


def _written_out(observed: ObservedCall, node: Node) -> NormCall | None:
    shape = shape_of(node)
    core = _rms_core(node)
    if core is None or not shape:
        return None
    value, inside = core
    last, weight = _weighted(observed, node)
    inside |= _between(node, last)
    loose = [n for n in inside if n is not last and not set(_users(n)) <= inside]
    if loose or shape_of(value) != shape:
        return None
    return NormCall(last, value, "rms", shape[-1], weight, None, frozenset(inside))


def _rms_core(node: Node) -> tuple[Node, set[Node]] | None:
    """Return x of x / sqrt(mean(x^2) + eps), and the nodes of the formula."""
    first, second = argument(node, 0, "self"), argument(node, 1, "other")
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None
    divides = op_name(node) in ("div", "true_divide")
    for scaled, root in ((first, second), (second, first))[: 1 if divides else 2]:
        inside = {node}
        under = _under_root(root, inside, inverse=not divides)
        square = None if under is None else _mean_square(under, inside)
        if square is None:
            continue
        value, same = _strip(scaled, set())
        other, _ = _strip(square, same)
        if value is other:
            return value, inside
    return None


def _under_root(node: Node, inside: set[Node], *, inverse: bool) -> Node | None:
    """Return v, where `node` is sqrt(v), or one over that."""
    node, _ = _strip(node, inside)
    name = op_name(node)
    inside.add(node)
    if name in ("sqrt", "rsqrt"):
        return _first(node) if (name == "rsqrt") is inverse else None
    if name == "pow":
        wanted = -0.5 if inverse else 0.5
        return _first(node) if number(argument(node, 1, "exponent")) == wanted else None
    if name == "reciprocal" and inverse and (inner := _first(node)) is not None:
        return _under_root(inner, inside, inverse=False)
    return None


def _mean_square(node: Node, inside: set[Node]) -> Node | None:
    """Return x, where `node` is mean(x^2) over the last axis, perhaps with a number added."""
    node, _ = _strip(node, inside)
    if op_name(node) == "add" and number(argument(node, 1, "other")) is not None:
        inside.add(node)
        node, _ = _strip(node.args[0], inside)
    if op_name(node) != "mean":
        return None
    dims, keeps = argument(node, 1, "dim"), argument(node, 2, "keepdim")
    shape = shape_of(node) or ()
    if not isinstance(dims, list | tuple) or len(dims) != 1 or keeps is not True:
        return None
    if dims[0] not in (-1, len(shape) - 1):
        return None
    inside.add(node)
    square, _ = _strip(node.args[0], inside)
    name = op_name(square)
    squares = name == "square" or (name == "pow" and number(argument(square, 1, "exponent")) == 2.0)
    squares = squares or (name == "mul" and square.args[0] is square.args[1])
    inside.add(square)
    return _first(square) if squares else None


def _weighted(observed: ObservedCall, node: Node) -> tuple[Node, Expression | None]:
    """Return the value of a norm behind its weight, and that weight, if it has one."""
    after = _last_same(node)
    users = _users(after)
    if len(users) != 1:
        return node, None
    user = users[0]
    if op_name(user) not in ("mul", "multiply") or shape_of(user) != shape_of(node):
        return node, None
    others = [a for a in user.args if a is not after]
    weight = expression_of(observed, others[0]) if len(others) == 1 else None
    if weight is None or (shape_of(weight.node) or (0,))[-1] != (shape_of(node) or (1,))[-1]:
        return node, None
    return user, weight


def _between(first: Node, last: Node) -> set[Node]:
    """Return the nodes from a norm's plain value to its weighted one."""
    found = {first}
    while first is not last:
        first = _users(first)[0]
        found.add(first)
    return found


def _last_same(node: Node) -> Node:
    while len(users := _users(node)) == 1 and op_name(users[0]) in SAME:
        node = users[0]
    return node


def _users(node: Node) -> list[Node]:
    """Return the calls that compute with a value: those that ask for its form do not."""
    return [user for user in node.users if op_name(user) not in FORM]


def _strip(node: object, inside: set[Node]) -> tuple[Node, set[Node]]:
    """Return what a node is but for its type, and `inside` with the casts between."""
    assert isinstance(node, Node)
    while op_name(node) in SAME and (inner := _first(node)) is not None:
        inside.add(node)
        node = inner
    return node, inside


def _first(node: Node) -> Node | None:
    value = node.args[0] if node.args else None
    return value if isinstance(value, Node) else None
