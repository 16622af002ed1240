"""Give a layer's weight a value, through whatever computes that weight.

    plain                    a new parameter, under every name that shares it
    parametrized             right_inverse(value) into the originals: weight norm, orthogonal ...
    old-style weight norm    g = ||value||, v = value
    other old-style hooks    NAME_orig = value: spectral norm, pruning

`init.normal_(layer.weight)` on a parametrized layer fills a temporary and changes nothing. What a
parametrization remembers of the old weight (the vectors of a spectral norm) is refreshed, the
weight is read back, and what the parametrization made of it is returned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm

from rewrite.errors import one_line
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.nn.weight_norm import WeightNorm
from rewrite.weights.spectral import refresh_chain, refresh_old_spectral_norm
from rewrite.weights.weight_norm import has_old_weight_norm

_READ_BACK = 1.0
"""How many times the square root of eps a weight may differ from the value that it was given."""


def assign_refusal(module: nn.Module, name: str) -> str | None:
    """Return why `name` of a module cannot be given a value, or None."""
    if name in has_old_weight_norm(module) or name in old_hooks(module):
        return None
    if parametrize.is_parametrized(module, name):
        return _parametrization_refusal(module, name)
    value = module._parameters.get(name)
    if value is None:
        return f"{name} is no parameter"
    if isinstance(value, nn.parameter.UninitializedParameter):
        return f"{name} is lazy; run the model once first"
    if type(value.data) is not torch.Tensor or not value.is_floating_point():
        return f"{name} is quantized or not floating point"
    return None


def _parametrization_refusal(module: nn.Module, name: str) -> str | None:
    chain: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    if not all(hasattr(step, "right_inverse") for step in chain):
        return f"{name} has a parametrization without right_inverse; remove it first"
    trial = copy.deepcopy(chain)  # an inverse may write into its parametrization
    try:
        with torch.no_grad():
            trial.right_inverse(getattr(module, name).detach().clone())
    except Exception as error:  # noqa: BLE001 - anybody's code
        return f"{name}: {_kind(module, name)} takes no value: {one_line(error)}; remove it first"
    return None


def old_hooks(module: nn.Module) -> dict[str, Any]:
    """Return the hooks that compute a weight from `NAME_orig`, by the weight's name."""
    found = {}
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if isinstance(name, str) and module._parameters.get(f"{name}_orig") is not None:
            found[name] = hook
    return found


def is_frozen(module: nn.Module, name: str) -> bool:
    """Return whether nothing behind `name` of a module requires a gradient."""
    if name in has_old_weight_norm(module):
        sources = [getattr(module, f"{name}_{part}") for part in "gv"]
    elif name in old_hooks(module):
        sources = [getattr(module, f"{name}_orig")]
    elif parametrize.is_parametrized(module, name):
        sources = list(module.parametrizations[name].parameters())  # type: ignore[union-attr, index]  # a ModuleDict, for nn.Module a Tensor or a Module
    else:
        held = module._parameters.get(name)
        sources = [] if held is None else [held]
    return not any(source.requires_grad for source in sources)


def assign(
    writer: TensorWriter,
    module: nn.Module,
    name: str,
    value: torch.Tensor,
    ties: Sequence[tuple[nn.Module, str]] = (),
) -> str:
    """Give `name` of `module`, and of what is tied to it, this value; `requires_grad` is kept.

    Returns what a parametrization made of the value, "" where the weight is the value. A value that
    it makes NaN or infinity of (zero, through a spectral norm) leaves the weight as it was.
    """
    hooked = name in old_hooks(module)
    if hooked or parametrize.is_parametrized(module, name):
        # The originals keep their identity, so what shares them follows.
        before = {key: t.detach().clone() for key, t in module.state_dict().items()}
        computed = vars(module).get(name)
        with torch.no_grad():
            (_assign_hooked if hooked else _assign_through)(writer, module, name, value)
            made = getattr(module, name).detach()
            if bool(made.isfinite().all()) or not bool(value.isfinite().all()):
                return _made_of(module, name, value, made)
            writer.restore(module, before)
            if hooked:
                vars(module)[name] = computed
        return f"{name} is left as it was: {_kind(module, name)} makes NaN or infinity of the value"
    if name in has_old_weight_norm(module):
        _assign_old(writer, module, name, value)
        return ""
    old = module._parameters[name]
    assert old is not None  # `assign_refusal` has seen to it
    writer.write(module, name, _like(value, old), old.requires_grad)
    for holder, key in ties:
        writer.share(holder, key, module._parameters[name])
    return ""


def _made_of(module: nn.Module, name: str, value: torch.Tensor, made: torch.Tensor) -> str:
    """Describe how the weight that is read back is related to the value that was given."""
    given, read = value.detach().to(made.device, torch.float64), made.to(torch.float64)
    if given.shape != read.shape:
        return f"{name}: {_kind(module, name)} makes {tuple(read.shape)} of {tuple(given.shape)}"
    size = float(given.norm())
    allowed = _READ_BACK * torch.finfo(made.dtype).eps ** 0.5
    if float((read - given).norm()) <= allowed * size or not size:
        return ""
    scale = float((read * given).sum()) / size**2
    apart = float((read - scale * given).norm()) / max(float(read.norm()), size * abs(scale))
    if apart <= allowed:
        return f"{name} is {scale:.4g} times what was drawn: {_kind(module, name)}"
    return (
        f"{name} is not what was drawn but what {_kind(module, name)} makes of it: "
        f"{float((read - given).norm()) / size:.2g} away, relative"
    )


def _kind(module: nn.Module, name: str) -> str:
    """Return what computes a weight, in words."""
    if (hook := old_hooks(module).get(name)) is not None:
        return type(hook).__name__
    chain: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    return ", ".join(type(step).__name__.strip("_") for step in chain)


def _like(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return `value` with device, dtype and memory format of `old`."""
    return torch.empty_like(old.detach()).copy_(value)


def _assign_through(
    writer: TensorWriter, module: nn.Module, name: str, value: torch.Tensor
) -> None:
    value = _like(value, getattr(module, name))
    chain: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    if len(chain) == 1 and isinstance(chain[0], TorchWeightNorm | WeightNorm):
        ours = isinstance(chain[0], WeightNorm)
        g, v = chain[0].right_inverse(value) if ours else _direction(value, chain.original0)
        writer.refill(chain.original0, g)
        writer.refill(chain.original1, v.clone())
        return
    writer.assign_through(module, name, value)
    _refresh(writer, module, name)


def _assign_hooked(writer: TensorWriter, module: nn.Module, name: str, value: torch.Tensor) -> None:
    original = getattr(module, f"{name}_orig")
    writer.refill(original, _like(value, original))
    _refresh(writer, module, name)


def _refresh(writer: TensorWriter, module: nn.Module, name: str) -> None:
    """Bring what a weight's computation remembers of it up to date, and compute it."""
    hook = old_hooks(module).get(name)
    if hook is not None:
        if isinstance(hook, OldSpectralNorm):
            refresh_old_spectral_norm(writer, module, hook)
        hook(module, None)
    elif parametrize.is_parametrized(module, name):
        refresh_chain(writer, module, name)


def _assign_old(writer: TensorWriter, module: nn.Module, name: str, value: torch.Tensor) -> None:
    old_g, old_v = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
    g, v = _direction(_like(value, old_v), old_g)
    writer.refill(old_g, g)
    writer.refill(old_v, v)
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
