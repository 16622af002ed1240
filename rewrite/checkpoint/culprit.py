"""Find which attribute of a model keeps the whole from being written so that it opens.

write(model) fails, write(module that holds the attribute alone) fails   ->   the attribute
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_REGISTERED = ("_parameters", "_buffers")
_LEFT = frozenset({"_modules", "training", "_non_persistent_buffers_set"})


def culprit(model: nn.Module, fails: Callable[[nn.Module], bool]) -> str | None:
    """Return the qualified name of the first attribute that cannot be written, None if none.

    Args:
        model: what could not be written; it is not changed.
        fails: says whether a module cannot be written.
    """
    for name, value in _held(model):
        holder = nn.Identity()
        vars(holder)["held"] = value
        if fails(holder):
            return name
    return None


def _held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every attribute of every module by its qualified name, plain tensors apart."""
    for place, module in model.named_modules():
        start = f"{place}." if place else ""
        for key in _REGISTERED:
            for name, value in vars(module)[key].items():
                if not (value is None or _is_plain(value)):
                    yield f"{start}{name}", value
        usual = vars(nn.Identity())
        for name, value in vars(module).items():
            if name in _REGISTERED or name in _LEFT:
                continue
            if not (name in usual and not value):
                yield f"{start}{name}", value


def _is_plain(value: torch.Tensor) -> bool:
    kinds = (torch.Tensor, nn.Parameter)
    return type(value) in kinds and value.layout is torch.strided and not value.is_quantized
