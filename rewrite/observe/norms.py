"""Normalizations in an exported call, whichever way they are written, by their affine part.

    y = (a.w + c) * n(x) + b        n: divides by a root of x's own statistics

    a = 1, c = 0    LayerNorm, RMSNorm, T5, Llama
    a = 1, c = 1    Gemma

`aten.layer_norm` and `aten.rms_norm` say it themselves. In code it is a product of a value that was
divided by a root and of an affine expression of one parameter of one axis, perhaps cast, and
perhaps a sum with another such parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from rewrite.graph.traits import argument, spelled
from rewrite.observe.export import ObservedCall
from rewrite.observe.spellings import SAME, number, op_name, shape_of

_VIEWS = spelled("view", "unsqueeze", "expand", "unflatten", "flatten")
_ROOTS = spelled("rsqrt", "sqrt", "linalg_vector_norm", "norm", "reciprocal", "std")


@dataclass(frozen=True)
class Expression:
    """a.w + c of one parameter w, by its name; `node` is its placeholder."""

    tensor: str
    node: Node
    factor: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class ObservedNorm:
    """One call of a normalization with an affine part.

    Attributes:
        node: the call whose value is the normalized one, scaled and shifted.
        weight: the expression that it is multiplied by.
        bias: the parameter that is added, if any.
        kind: "layer" or "rms".
        inside: every node that reads the weight or the bias on the way to `node`.
    """

    node: Node
    weight: Expression
    bias: Expression | None
    kind: str
    inside: frozenset[Node]


def norms_of(observed: ObservedCall) -> Iterator[ObservedNorm]:
    """Yield every call of a normalization with a weight, in data-flow order."""
    for node in observed.graph.nodes:
        name = op_name(node)
        if name in ("layer_norm", "rms_norm", "native_layer_norm"):
            norm = _whole(observed, node, "rms" if name == "rms_norm" else "layer")
        elif name in ("mul", "multiply"):
            norm = _written_out(observed, node)
        else:
            continue
        if norm is not None:
            yield norm


def expression_of(observed: ObservedCall, node: object) -> Expression | None:
    """Return the affine expression of one parameter of one axis that `node` is, or None."""
    if not isinstance(node, Node):
        return None
    if node in observed.tensors:
        shape = shape_of(node)
        if shape is None or sum(size > 1 for size in shape) > 1 or not shape:
            return None
        return Expression(observed.tensors[node], node)
    name, operands = op_name(node), [a for a in node.args if isinstance(a, Node)]
    if name in SAME or name in _VIEWS:
        inner = expression_of(observed, operands[0]) if operands else None
        shape = shape_of(node)
        lasts = shape is not None and inner is not None and shape[-1:] == _size(inner.node)
        return inner if lasts else None
    if name not in ("add", "mul", "rsub", "sub") or len(operands) != 1 or len(node.args) < 2:
        return None
    inner = expression_of(observed, operands[0])
    other = next((number(a) for a in node.args[:2] if not isinstance(a, Node)), None)
    if inner is None or other is None or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    if name == "add":
        return Expression(inner.tensor, inner.node, inner.factor, inner.offset + other)
    if name == "mul":
        return Expression(inner.tensor, inner.node, inner.factor * other, inner.offset * other)
    return None


def _size(node: Node) -> tuple[int, ...]:
    shape = shape_of(node) or ()
    count = 1
    for size in shape:
        count *= size
    return (count,)


def _whole(observed: ObservedCall, node: Node, kind: str) -> ObservedNorm | None:
    shape = argument(node, 1, "normalized_shape")
    weight = expression_of(observed, argument(node, 2, "weight"))
    given = None if kind == "rms" else argument(node, 3, "bias")
    bias = expression_of(observed, given)
    if weight is None or not isinstance(shape, list | tuple) or len(shape) != 1:
        return None
    if given is not None and bias is None:
        return None
    return ObservedNorm(node, weight, bias, kind, frozenset({node}))


def _written_out(observed: ObservedCall, node: Node) -> ObservedNorm | None:
    first, second = (argument(node, 0, "self"), argument(node, 1, "other"))
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None
    weight, value = expression_of(observed, first), second
    if weight is None:
        weight, value = expression_of(observed, second), first
    if weight is None or shape_of(node) != shape_of(value):
        return None
    if (shape_of(node) or (0,))[-1:] != _size(weight.node) or not _normalized(observed, value):
        return None
    inside = {node}
    last, bias = node, None
    after = node
    while len(after.users) == 1 and op_name(next(iter(after.users))) in SAME:
        after = next(iter(after.users))
    if len(after.users) == 1 and op_name(sum_ := next(iter(after.users))) == "add":
        others = [a for a in sum_.args if isinstance(a, Node) and a is not after]
        found = expression_of(observed, others[0]) if len(others) == 1 else None
        plain = found is not None and (found.factor, found.offset) == (1.0, 0.0)
        if plain and shape_of(sum_) == shape_of(node) and not sum_.kwargs:
            last, bias = sum_, found
            inside.add(sum_)
    kind = "rms" if bias is None else "layer"
    return ObservedNorm(last, weight, bias, kind, frozenset(inside))


def _normalized(observed: ObservedCall, value: Node, depth: int = 8) -> bool:
    """Return whether a value was divided by a root of statistics of its own."""
    while depth:
        depth -= 1
        name = op_name(value)
        inputs = [a for a in value.args if isinstance(a, Node)]
        if name in SAME or name in _VIEWS:
            value = inputs[0]
        elif name in ("layer_norm", "rms_norm"):
            return argument(value, 2, "weight") is None
        elif name in ("mul", "div", "true_divide"):
            return any(_is_root(node) for node in inputs)
        else:
            return False
    return False


def _is_root(node: Node, depth: int = 6) -> bool:
    for _ in range(depth):
        name = op_name(node)
        if name in _ROOTS:
            return True
        if name == "pow":
            return number(argument(node, 1, "exponent")) in (-0.5, 0.5)
        inputs = [a for a in node.args if isinstance(a, Node)]
        if name not in (*SAME, *_VIEWS, "add", "clamp_min", "clamp", "maximum") or not inputs:
            return False
        node = inputs[0]
    return False
