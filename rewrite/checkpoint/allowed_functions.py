"""The list of functions and methods that a graph in a file may call: tensor operations only.

    name -> function        only if it is on a list here, or the user named it in full
    function -> name        the inverse, for the saving side

What reads or writes files, aliases memory by numbers of its own, hands out pointers, calls what it
is given, or reaches into Python is on no list: `torch.from_file`, `torch.as_strided`,
`Tensor.data_ptr`, `Tensor.apply_`, `operator.attrgetter`, `getattr(x, "__class__")`. The lists
are data (`allowed_operators.json`), made by `python -m benchmarks.allowed_classes`.
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fft
import torch.functional
import torch.nn.functional
import torch.nn.init
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Node, _get_qualified_name

from rewrite.checkpoint.vetting.names import FUNCTION_PLACES as FUNCTION_PLACES
from rewrite.checkpoint.vetting.names import TORCHVISION_HELD, listed, public_name
from rewrite.errors import CheckpointError

_NOT_LAYERS = frozenset(
    {
        "boolean_dispatch",
        "handle_torch_function",
        "has_torch_function",
        "has_torch_function_unary",
        "has_torch_function_variadic",
        "assert_int_or_pair",
        "triplet_margin_with_distance_loss",
        "Callable",
        "DType",
        "Optional",
        "Tensor",
    }
)


_FUNCTIONAL = (
    frozenset(
        n
        for n in dir(torch.nn.functional)
        if not n.startswith("_")
        and callable(getattr(torch.nn.functional, n))
        and not isinstance(getattr(torch.nn.functional, n), type)
    )
    - _NOT_LAYERS
)


_OPERATOR = frozenset(n for n in operator.__all__) - {
    "attrgetter",
    "itemgetter",
    "methodcaller",
    "call",
    "setitem",
    "delitem",
}


_INIT = frozenset(n for n in dir(torch.nn.init) if n.endswith("_") and not n.startswith("_")) | {
    "calculate_gain"
}
"""What draws a tensor anew: a layer keeps such functions, no graph calls one."""


_MATH = frozenset(n for n in dir(math) if not n.startswith("_") and callable(getattr(math, n)))


_BUILTINS = frozenset(
    {"getattr", "len", "int", "float", "bool", "max", "min", "abs", "round", "sum", "tuple", "list"}
)


_TORCHVISION = frozenset(
    {
        "torchvision.ops.stochastic_depth.stochastic_depth",
        "torchvision.models.swin_transformer.shifted_window_attention",
        "torchvision.models.swin_transformer._get_relative_position_bias",
        "torchvision.models.swin_transformer._patch_merging_pad",
        "torchvision.ops.boxes.nms",
        "torchvision.ops.boxes.batched_nms",
        "torchvision.ops.roi_align.roi_align",
    }
)


METHODS = listed("methods") | {"keys", "values", "items", "get", "append", "extend"}
"""Methods that a graph may call: those of tensors that only compute, and of plain containers."""


_OBJECTS = (torch.Tensor, str, bytes, list, tuple, dict, set, int, float, torch.Size)


def readable(attribute: str) -> bool:
    """Say whether a graph may read this attribute of a value: data, never a method."""
    if not attribute.isidentifier() or attribute.startswith("_"):
        return False
    if attribute in ("grad_fn", "storage"):
        return False
    return not any(callable(getattr(kind, attribute, None)) for kind in _OBJECTS)


def _homes() -> dict[str, tuple[Any, frozenset[str]]]:
    return {
        "torch": (torch, listed("torch") | {"_assert"}),
        "torch.fft": (torch.fft, listed("torch.fft")),
        "torch.linalg": (torch.linalg, listed("torch.linalg")),
        "torch.special": (torch.special, listed("torch.special")),
        "torch.nn.functional": (torch.nn.functional, _FUNCTIONAL),
        "torch.Tensor": (torch.Tensor, METHODS),
        "_operator": (operator, _OPERATOR),
        "math": (math, _MATH),
        "builtins": (builtins, _BUILTINS),
    }


def find_function(name: str, trust: Sequence[str]) -> Any:
    """Return the function of that name, or raise CheckpointError."""
    place, _, last = public_name(name).rpartition(".")
    home, listed = _homes().get(place, (None, frozenset()))
    if last in listed and hasattr(home, last):
        return getattr(home, last)
    if place.startswith("torch.ops"):
        return _operation(name)
    if name in _TORCHVISION or name in trust:
        try:
            found: Any = importlib.import_module(name.rpartition(".")[0])
            return getattr(found, last)
        except (ImportError, AttributeError, ValueError) as error:
            raise CheckpointError(f"holds a graph that calls {name}: {error}") from error
    raise CheckpointError(
        f"holds a graph that calls {name}; pass --trust {name} if you know that function"
    )


def held_function(name: str) -> Any:
    """Return the function that a module may keep as an attribute, None if it is on no list."""
    place, _, last = public_name(name).rpartition(".")
    home, listed = _homes().get(place, (None, frozenset()))
    if place != "builtins" and last in listed:
        return getattr(home, last, None)
    if place == "torch.nn.init" and last in _INIT:
        return getattr(torch.nn.init, last)
    if name in TORCHVISION_HELD:
        return getattr(importlib.import_module(name.rpartition(".")[0]), last)
    return None


def _operation(name: str) -> Any:
    """Return an operator of torch.ops, as exported programs call them."""
    parts = name.split(".")[2:]
    place, base, overload = (*parts, "default")[:3] if len(parts) in (2, 3) else ("", "", "")
    packets = {entry.rpartition(".")[0] for entry in listed("operators")}
    whole = f"{place}::{base}" in packets if len(parts) == 2 else False
    if not whole and f"{place}::{base}.{overload}" not in listed("operators"):
        raise CheckpointError(
            f"holds a graph that calls {name}, which is on no list of what only computes"
        )
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    if not isinstance(found, OpOverload | OpOverloadPacket):
        raise CheckpointError(f"holds a graph that calls {name}, which does not exist here")
    return found


def name_of_function(function: Any, node: Node) -> str:
    """Return the name under which `find_function` finds a function again.

    Raises:
        CheckpointError: no name leads to it.
    """
    name = _get_qualified_name(function)
    if getattr(builtins, name, None) is function:
        name = f"builtins.{name}"
    name = public_name(name)
    try:
        found = find_function(name, (name,))
    except CheckpointError as error:
        raise CheckpointError(f"the graph's node {node.name}: {error}") from error
    if found is not function:
        raise CheckpointError(
            f"the graph's node {node.name} calls {function!r}, but {name} is something else"
        )
    return name
