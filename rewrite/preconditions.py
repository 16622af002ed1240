"""What a model has to be before it can be rewritten, and what it has to be before it can be run."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rewrite.errors import CaptureError
from rewrite.runtime.tree import Tree, tensor_names


def check_convertible(model: nn.Module) -> None:
    """Raise if no pass can do anything with `model`.

    Raises:
        CaptureError: it is no module, or TorchScript, whose code is compiled.
    """
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise CaptureError(
            f"{kind} is no torch.nn.Module: pass a model, as `rewrite.load` returns one"
        )
    if isinstance(model, torch.jit.ScriptModule):
        kind = getattr(model, "original_name", type(model).__name__)
        raise CaptureError(
            f"{kind} is a TorchScript module, whose code is compiled: "
            "rewrite the eager model that it was made from"
        )


def why_not_run(model: nn.Module) -> str:
    """Return why `model` cannot be run without becoming another one, or "".

    A tensor on the meta device has no values; a lazy layer would take its shape from the input.
    """
    tree = Tree(model)
    names = tensor_names(tree)
    absent: list[str] = []
    lazy: list[str] = []
    for _, module in tree.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and (is_lazy(tensor) or tensor.is_meta):
                (lazy if is_lazy(tensor) else absent).append(names[id(tensor)])
    if lazy:
        return f"{lazy[0]} is lazy and has seen no input"
    if absent:
        return f"{absent[0]} has no values (meta device, {len(absent)} tensors)"
    return ""
