"""The functions and methods that the graph of a file may call: those that compute on tensors.

    name -> function        only if it is on a list here, or the user named it in full
    function -> name        the inverse, for the saving side

What reads or writes files, calls what it is given, or reaches into Python is on no list:
`torch.from_file`, `Tensor.apply_`, `operator.attrgetter`, `getattr(x, "__class__")`.
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.functional
import torch.nn.functional
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Node, _get_qualified_name

from rewrite.errors import CheckpointError

_FILES = frozenset({"from_file", "frombuffer", "from_numpy", "import_ir_module", "_from_blob"})


_TORCH = (
    frozenset(n for n in dir(torch._C._VariableFunctions) if not n.startswith("_"))
    | frozenset(torch.functional.__all__)
    | frozenset(n for n in dir(torch) if n.startswith("sym_"))
    | {"_assert", "is_tensor", "is_storage"}
) - _FILES


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


_OPERATIONS = ("aten", "torchvision", "prims")


METHODS = frozenset(
    name
    for name in dir(torch.Tensor)
    if not name.startswith("_") and callable(getattr(torch.Tensor, name))
) - {
    "apply_",
    "map_",
    "map2_",
    "numpy",
    "tolist",
    "storage",
    "untyped_storage",
    "set_",
    "data_ptr",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "share_memory_",
    "module_load",
    "reinforce",
    "to_mkldnn",
} | {"keys", "values", "items", "get", "append", "extend"}
"""Methods that a graph may call: those of tensors that only compute, and of plain containers."""


_OBJECTS = (torch.Tensor, str, bytes, list, tuple, dict, set, int, float, torch.Size)


def readable(attribute: str) -> bool:
    """Say whether a graph may read this attribute of a value: data, never a method."""
    if not attribute.isidentifier() or attribute.startswith("_"):
        return False
    if attribute in ("grad_fn", "storage"):
        return False
    return not any(callable(getattr(kind, attribute, None)) for kind in _OBJECTS)


def find_function(name: str, trust: Sequence[str]) -> Any:
    """Return the function of that name, or raise CheckpointError."""
    place, _, last = name.rpartition(".")
    listed = {
        "torch": (torch, _TORCH),
        "torch.nn.functional": (torch.nn.functional, _FUNCTIONAL),
        "torch._C._nn": (torch.nn.functional, _FUNCTIONAL),
        "torch.functional": (torch.functional, _TORCH),
        "torch.Tensor": (torch.Tensor, METHODS),
        "_operator": (operator, _OPERATOR),
        "math": (math, _MATH),
        "builtins": (builtins, _BUILTINS),
    }
    if place in listed and last in listed[place][1]:
        return getattr(listed[place][0], last)
    if place.startswith("torch.ops."):
        return _operation(name)
    if name in _TORCHVISION or name in trust:
        try:
            return getattr(importlib.import_module(place), last)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(f"holds a graph that calls {name}: {error}") from error
    raise CheckpointError(
        f"holds a graph that calls {name}; pass --trust {name} if you know that function"
    )


def _operation(name: str) -> Any:
    """Return an operator of torch.ops, as exported programs call them."""
    parts = name.split(".")[2:]
    if len(parts) not in (2, 3) or parts[0] not in _OPERATIONS or parts[1] in _FILES:
        raise CheckpointError(f"holds a graph that calls {name}")
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    if not isinstance(found, OpOverload | OpOverloadPacket):
        raise CheckpointError(f"holds a graph that calls {name}, which does not exist here")
    return found


def name_of_function(function: Any, node: Node) -> str:
    """Return the name under which `find_function` finds a function again."""
    name = _get_qualified_name(function)
    if getattr(builtins, name, None) is function:
        name = f"builtins.{name}"
    try:
        found = find_function(name, (name,))
    except CheckpointError as error:
        raise CheckpointError(f"the graph's node {node.name}: {error}") from error
    if found is not function:
        raise CheckpointError(
            f"the graph's node {node.name} calls {function!r}, but {name} is something else"
        )
    return name
