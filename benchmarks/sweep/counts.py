"""Count what a model really calls: its batch norms and its activations, however they are spelled.

A `TorchFunctionMode` sees the outermost torch function of every call that Python code makes, so a
module, `torch.nn.functional` and a method count once each, and a rewrite that loses an activation
shows in the number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ACTIVATIONS = frozenset(
    {
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu"),
        *("mish", "tanh", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "softplus"),
        *("softsign", "softmax", "glu", "logsigmoid", "log_softmax", "clamp"),
    }
)
_RUNNING_MEAN = {F.batch_norm: 1, torch.batch_norm: 3, torch.native_batch_norm: 3}


@dataclass
class Counts:
    """What one run called.

    Attributes:
        norms: the running means that batch norms were called with, by identity.
        norm_calls: calls of a batch norm.
        activations: calls of an activation.
        arithmetic: names of called modules that hold running statistics and compute with them by
            themselves: no batch norm is called (frozen norms of detectors).
        held: those running means, so that no identity is used twice.
    """

    norms: set[int] = field(default_factory=set)
    norm_calls: int = 0
    activations: int = 0
    arithmetic: list[str] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)


class _Counting(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RUNNING_MEAN:
            position = _RUNNING_MEAN[func]
            mean = args[position] if len(args) > position else kwargs.get("running_mean")
            self._counts.norm_calls += 1
            if isinstance(mean, Tensor):
                self._counts.held.append(mean)
                self._counts.norms.add(identity(mean))
            else:
                self._counts.norms.add(-self._counts.norm_calls)
        elif getattr(func, "__name__", "").rstrip("_") in _ACTIVATIONS:
            self._counts.activations += 1
        return func(*args, **kwargs)


def run(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Any, Counts]:
    """Run `model` once without gradients; return its output and what it called."""
    counts = Counts()
    called: list[tuple[str, int]] = []
    torch.manual_seed(0)
    with _watching(model, called), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _Counting(counts):
            output = model(*example_inputs)
    counts.arithmetic = sorted({name for name, mean in called if mean not in counts.norms})
    return output, counts


@contextmanager
def _watching(model: nn.Module, called: list[tuple[str, int]]) -> Iterator[None]:
    """Note each call of a module that holds running statistics of the batch kind."""
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: called.append((name, identity(module.running_mean)))
        )
        for name, module in model.named_modules()
        if holds_statistics(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def holds_statistics(module: nn.Module) -> bool:
    """Return whether `module` is a float norm with running statistics, not an instance norm."""
    return (
        isinstance(getattr(module, "running_mean", None), Tensor)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and not type(module).__module__.startswith("torch.ao.")
    )


def identity(tensor: Tensor) -> int:
    """Return what identifies a tensor that a module holds; its memory may move (copy-on-write)."""
    return id(tensor)
