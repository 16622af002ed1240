"""Labels through operators that move the elements of values, multiply them, or add values up.

    moved     an element of the result is one of an operand, and has its label
    scaled    (s . x) z = s . (x z),     s . x + s . y = s . (x + y)

An operator that moves elements is run on their labels. A product lets scales pass and no shifts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.errors import one_line
from rewrite.graph.traits import argument
from rewrite.observe.export import ObservedCall
from rewrite.observe.spellings import SCALES, number, op_name, shape_of

_NO_LABEL = -1


class Unfollowed(Exception):  # noqa: N818 - a reason, caught where it is decided
    """Why a map cannot be followed any further."""


def moved(observed: ObservedCall, labels: Mapping[Node, Any], node: Node) -> Any:
    """Return the labels of what an operator of `MOVES` makes of labelled values.

    Raises:
        Unfollowed: it chooses among channels, or by values of the input.
    """
    name = op_name(node)
    if name in ("expand_as", "view_as", "reshape_as") and node.args[0] not in labels:
        return None
    indices = _indices(observed, labels, node, name)

    def given(argument_: Any) -> Any:
        if isinstance(argument_, list | tuple):
            return [given(item) for item in argument_]
        if not isinstance(argument_, Node):
            return argument_
        if argument_ in labels and argument_ not in indices:
            return labels[argument_]
        shape = shape_of(argument_)
        if shape is None:
            raise Unfollowed(f"{observed.called(node)} depends on values of the input")
        if argument_ in indices:
            return torch.zeros(shape, dtype=torch.int64)
        return torch.full((1,) * len(shape), _NO_LABEL, dtype=torch.int32).expand(shape)

    args = [given(item) for item in node.args]
    kwargs = {key: given(item) for key, item in node.kwargs.items()}
    # Labels are expanded, so that a view of them may need a copy.
    target = torch.reshape if name in ("view", "_unsafe_view") else node.target
    assert callable(target)
    try:
        return target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise Unfollowed(
            f"{observed.called(node)} cannot be followed: {one_line(error)}"
        ) from error


def _indices(
    observed: ObservedCall, labels: Mapping[Node, Any], node: Node, name: str
) -> frozenset[Node]:
    """Return the values that choose elements; what they choose among has to carry one label."""
    if name == "index":
        places = list(enumerate(node.args[1]))  # type: ignore[arg-type]  # by the operator's schema
    elif name == "index_select":
        places = [(argument(node, 1, "dim"), argument(node, 2, "index"))]
    else:
        return frozenset()
    held = labels.get(node.args[0])  # type: ignore[arg-type]  # by the operator's schema
    chosen = [(axis, item) for axis, item in places if isinstance(item, Node)]
    for axis, item in chosen:
        value = item.meta.get("val")
        if item in labels or held is None or getattr(value, "dtype", None) == torch.bool:
            raise Unfollowed(f"{observed.called(node)} chooses by values of the input")
        if not torch.equal(held.amin(axis), held.amax(axis)):
            raise Unfollowed(f"{observed.called(node)} chooses channels by values of the input")
    return frozenset(item for _, item in chosen)


def scaled(observed: ObservedCall, labels: Mapping[Node, Any], node: Node) -> Tensor:
    """Return the labels of a product, or of a sum of values that all carry the same ones.

    Raises:
        Unfollowed: a scale does not pass.
    """
    name = op_name(node)
    shape = shape_of(node)
    operands = [a for a in node.args[(name == "where") :] if isinstance(a, Node | int | float)]
    held = [a for a in operands if isinstance(a, Node) and a in labels]
    others = [a for a in operands if a not in held]
    refused = Unfollowed(f"its output is read by {observed.called(node)}, which is no linear layer")
    if shape is None or (node.args[0] in labels and name == "where"):
        raise refused
    if name in SCALES and (len(held) != 1 or (name != "mul" and node.args[0] is not held[0])):
        raise refused
    if name in ("where", "masked_fill"):
        others = [a for a in operands[(name == "masked_fill") :] if a not in held]
        if name == "masked_fill" and node.args[1] in labels:
            raise refused
        if not all(_is_zero(a) for a in others if name == "where" or a is not node.args[1]):
            raise refused
    elif name in ("add", "sub") and (others or node.kwargs):
        raise refused
    spread: list[Tensor] = [labels[a].expand(shape) for a in held]
    if any(not torch.equal(spread[0], other) for other in spread[1:]):
        raise Unfollowed(f"in {observed.called(node)} its channels meet other channels of it")
    return spread[0]


def _is_zero(value: Any) -> bool:
    """Return whether a value is a constant zero."""
    if isinstance(value, int | float):
        return bool(value == 0)
    if not isinstance(value, Node):
        return False
    name = op_name(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return not [user for user in value.users if op_name(user).endswith("_")]
    return name in ("scalar_tensor", "full") and number(value.args[-1]) == 0
