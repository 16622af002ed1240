"""Give a layer's weight a value, through whatever computes that weight.

    plain                    a new parameter, under every name that shares it
    parametrized             right_inverse(value) into the originals: weight norm, orthogonal ...
    old-style weight norm    g = ||value||, v = value

`init.normal_(layer.weight)` on a parametrized layer fills a temporary and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm

from rewrite.nn.weight_norm import WeightNorm
from rewrite.weights.weight_norm import has_old_weight_norm


def assign_refusal(module: nn.Module, name: str) -> str | None:
    """Return why `name` of a module cannot be given a value, or None."""
    if name in has_old_weight_norm(module):
        return None
    if parametrize.is_parametrized(module, name):
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        if all(hasattr(step, "right_inverse") for step in chain):
            return None
        return f"{name} has a parametrization without right_inverse; remove it first"
    value = module._parameters.get(name)
    if value is None:
        return f"{name} is no parameter"
    if isinstance(value, nn.parameter.UninitializedParameter):
        return f"{name} is lazy; run the model once first"
    if type(value.data) is not torch.Tensor or not value.is_floating_point():
        return f"{name} is quantized or not floating point"
    return None


def is_frozen(module: nn.Module, name: str) -> bool:
    """Return whether nothing behind `name` of a module requires a gradient."""
    if name in has_old_weight_norm(module):
        sources = [getattr(module, f"{name}_{part}") for part in "gv"]
    elif parametrize.is_parametrized(module, name):
        sources = list(module.parametrizations[name].parameters())  # type: ignore[union-attr, index]
    else:
        held = module._parameters.get(name)
        sources = [] if held is None else [held]
    return not any(source.requires_grad for source in sources)


def assign(
    module: nn.Module,
    name: str,
    value: torch.Tensor,
    ties: Sequence[tuple[nn.Module, str]] = (),
) -> None:
    """Give `name` of `module`, and of what is tied to it, this value; `requires_grad` is kept."""
    if name in has_old_weight_norm(module):
        _assign_old(module, name, value)
        return
    if parametrize.is_parametrized(module, name):
        # The originals keep their identity, so what shares them follows.
        with torch.no_grad():
            _assign_through(module, name, value)
        return
    old = module._parameters[name]
    assert old is not None  # `assign_refusal` has seen to it
    parameter = nn.Parameter(_like(value, old), old.requires_grad)
    for holder, key in ((module, name), *ties):
        holder._parameters[key] = parameter
        if isinstance(holder, nn.RNNBase):
            refresh_recurrent(holder)


def _like(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return `value` with device, dtype and memory format of `old`."""
    return torch.empty_like(old.detach()).copy_(value)


def refresh_recurrent(layer: nn.RNNBase) -> None:
    """Let a recurrent layer see its new parameters; a parametrized one computes them anyway."""
    if not parametrize.is_parametrized(layer):
        layer._init_flat_weights()


def _assign_through(module: nn.Module, name: str, value: torch.Tensor) -> None:
    current = getattr(module, name)
    value = _like(value, current)
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    if len(chain) == 1 and isinstance(chain[0], TorchWeightNorm):
        g, v = _direction(value, chain.original0)
        chain.original0.data, chain.original1.data = g, v
        return
    if len(chain) == 1 and isinstance(chain[0], WeightNorm):
        g, v = chain[0].right_inverse(value)
        chain.original0.data, chain.original1.data = g, v.clone()
        return
    setattr(module, name, value)


def _assign_old(module: nn.Module, name: str, value: torch.Tensor) -> None:
    old_g, old_v = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
    g, v = _direction(_like(value, old_v), old_g)
    old_g.data, old_v.data = g, v
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "name", None) == name:
            hook(module, None)


def _direction(value: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g and v of a weight for PyTorch's weight norm; a zero row gets some direction."""
    axes = tuple(
        axis
        for axis in range(value.dim())
        if axis >= g.dim() or g.shape[axis] != value.shape[axis] or value.shape[axis] == 1
    )
    norm = torch.linalg.vector_norm(value, dim=axes, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    spare = torch.randn(value.shape, generator=generator).to(value)
    v = torch.where(norm == 0, spare, value)
    return norm.reshape(g.shape), v
