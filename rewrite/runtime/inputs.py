"""What a model is called with: positional and keyword inputs, their batch, device and dtype."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from rewrite.runtime.control_flow import branches_in_python
from rewrite.runtime.leaves import mapped, tensors


@dataclass(frozen=True)
class Inputs:
    """What one call of a model gets."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Read a batch: a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        if isinstance(batch, list | tuple):
            return cls(tuple(batch))
        return cls((batch,))

    def map(self, function: Callable[[Any], Any]) -> Inputs:
        """Return these inputs with `function` applied to every leaf of nested containers."""
        return Inputs(mapped(self.args, function), mapped(dict(self.kwargs), function))

    def to(self, device: torch.device) -> Inputs:
        """Return these inputs with every tensor on `device`."""
        return self.map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf)

    def clone(self) -> Inputs:
        """Return these inputs with tensors that a forward may write into."""
        return self.map(
            lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        )

    def __str__(self) -> str:
        shapes = [_shape_text(t) for t in tensors([self.args, dict(self.kwargs)])]
        return ", ".join(shapes) or "no tensors"


@dataclass(frozen=True)
class ExampleCall:
    """One call of a model: what it is called in reports, and what the model gets."""

    name: str
    inputs: Inputs


def _shape_text(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def batches_for(model: nn.Module, batch: Any) -> Inputs:
    """Return what of a batch goes into `model`: loaders yield labels beside the inputs.

    Positional values beyond what the forward takes are left out.
    """
    inputs = Inputs.of(batch)
    limit = positional_limit(model)
    return Inputs(inputs.args[:limit], inputs.kwargs)


def positional_limit(model: nn.Module) -> int | None:
    """Return how many positional inputs a forward takes, or None where that is not bounded."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        # A forward implemented in C++ has no signature: take the batch as it is.
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a model without any."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in held), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of the first floating-point parameter, else of such a buffer, or float32."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.float32)


Mode = Callable[[], contextlib.AbstractContextManager[Any]]
"""How a forward is run: `torch.no_grad`, `torch.inference_mode`, or `with_gradients`."""


def call(model: nn.Module, inputs: Inputs, seed: int = 0, mode: Mode = torch.no_grad) -> Any:
    """Run `model` in `mode`, with the random state seeded and put back."""
    with seeded(seed), mode(), branches_in_python():
        return model(*inputs.args, **inputs.kwargs)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random state of torch, Python and numpy, and put it back."""
    ours, theirs = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Let results require gradients, without keeping what a backward would need."""

    def unpack(saved: None) -> torch.Tensor:
        raise RuntimeError("this forward keeps nothing for a backward")

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, unpack),
    ):
        yield
