"""What a model has to be before it can be rewritten, and what it has to be before it can be run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rewrite.errors import CaptureError
from rewrite.tree import Tree, tensor_names


def check_convertible(model: nn.Module) -> None:
    """Raise if no pass can do anything right with `model`.

    Raises:
        CaptureError: the model is TorchScript, whose code is compiled, or one of its layers is lazy
            and has seen no input yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        kind = getattr(model, "original_name", type(model).__name__)
        raise CaptureError(
            f"{kind} is a TorchScript module, whose code is compiled: "
            "rewrite the eager model that it was made from"
        )
    lazy = next(_uninitialized(model), None)
    if lazy is not None:
        name, module = lazy
        raise CaptureError(
            f"{name or 'the model'}: {type(module).__name__} is lazy and has seen no input: "
            "run one batch through the model first"
        )


def without_values(model: nn.Module) -> list[str]:
    """Return the names of the tensors of `model` that are on the meta device."""
    tree = Tree(model)
    names = tensor_names(tree)
    return [
        names[id(tensor)]
        for _, module in tree.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and tensor.is_meta
    ]


def _uninitialized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in Tree(model).modules():
        held = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in held):
            yield name, module
