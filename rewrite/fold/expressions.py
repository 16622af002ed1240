"""A constant of a forward as data: which tensors it is made of, and how.

    {"key": "norm.weight"}                                   a tensor of the state dict
    {"call": "add", "args": [1, {"key": "norm.weight"}]}     1 + w, of Gemma's RMSNorm
    {"literal": [...]}                                       a tensor that the forward makes itself

Evaluated in float64. Only the functions that are named here are ever called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.graph.spellings import function_name

Expression = Mapping[str, Any]


_UNCHANGED = frozenset({"to", "float", "double", "contiguous", "type", "type_as"})
"""In float64, these return what they are given."""


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "pow": operator.pow, "neg": operator.neg, "getitem": operator.getitem,
}  # fmt: skip


_METHODS = frozenset({
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "reciprocal", "view",
    "reshape", "unsqueeze", "squeeze", "expand", "flatten", "abs", "sigmoid", "tanh", "clamp", "t",
    "transpose", "permute",
})  # fmt: skip


def expression(node: Node, literals: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return a constant as data; None if it has a part that is no data.

    Args:
        node: a value that depends on parameters, buffers and numbers alone.
        literals: tensors that the forward makes itself, by the target that reads them.
    """
    if node.op == "get_attr":
        name = str(node.target)
        return {"literal": literals[name].tolist()} if name in literals else {"key": name}
    name = function_name(node) or ""
    if name in _UNCHANGED:
        return expression(node.all_input_nodes[0], literals)
    if name not in _OPERATORS and name not in _METHODS and name != "softplus":
        return None
    try:
        args = [_as_data(a, literals) for a in node.args]
        kwargs = {key: _as_data(a, literals) for key, a in node.kwargs.items()}
    except TypeError:
        return None
    return {"call": name, "args": args, "kwargs": kwargs}


def _as_data(value: Any, literals: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Node):
        found = expression(value, literals)
        if found is None:
            raise TypeError(f"{value} is no data")
        return found
    if isinstance(value, list | tuple):
        return [_as_data(item, literals) for item in value]
    if isinstance(value, slice):
        return {"slice": [_as_data(p, literals) for p in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} is no data")


def evaluate(data: Any, read: Callable[[str], Tensor]) -> Any:
    """Return what an expression is, in float64; `read` returns the tensor of a key.

    Raises:
        ValueError: the data is no expression.
    """
    if isinstance(data, list):
        return tuple(evaluate(item, read) for item in data)
    if not isinstance(data, Mapping):
        return data
    if "key" in data:
        held = read(data["key"]).detach()
        return held.double() if held.is_floating_point() else held
    if "literal" in data:
        return torch.tensor(data["literal"], dtype=torch.float64)
    if "slice" in data:
        return slice(*evaluate(data["slice"], read))
    if "ellipsis" in data:
        return Ellipsis
    name = str(data.get("call"))
    args = [evaluate(item, read) for item in data.get("args", ())]
    kwargs = {key: evaluate(item, read) for key, item in data.get("kwargs", {}).items()}
    if name in _OPERATORS and not kwargs:
        return _OPERATORS[name](*args)
    if name == "softplus":
        return torch.nn.functional.softplus(*args, **kwargs)
    if name not in _METHODS or not args or not isinstance(args[0], Tensor):
        raise ValueError(f"{name!r} is no function of a constant")
    return getattr(args[0], name)(*args[1:], **kwargs)


def keys(data: Any) -> set[str]:
    """Return the keys of all tensors that an expression reads."""
    if isinstance(data, list | tuple):
        return set().union(*map(keys, data)) if data else set()
    if not isinstance(data, Mapping):
        return set()
    if "key" in data:
        return {str(data["key"])}
    return set().union(*(keys(part) for part in data.values()))
