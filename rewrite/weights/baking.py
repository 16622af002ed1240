"""A layer whose weight is computed from other parameters, as the plain layer that it is.

    w = f(originals)   ->   w          weight norm, spectral norm, pruning, any parametrization

The weight that the layer computes in eval mode is the one that it keeps: as it is in float64,
rounded once. (One that float64 does not compute alike, a quantizer's, is kept bit for bit.) Whether
it may is decided before anything is changed: `bake_refusal` reads, `bake` edits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod as _Pruning
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.runtime.float64 import in_float64
from rewrite.runtime.modes import WIDE
from rewrite.tracing.tracer import has_parametrizations, hook_reasons
from rewrite.weights.tensor_recipe import Exact
from rewrite.weights.weight_norm import has_old_weight_norm, remove_weight_norm, weight_normed

_TENSORS = ("weight", "bias")


_OLD = (OldWeightNorm, SpectralNorm, _Pruning)


@dataclass(frozen=True)
class Baked:
    """What was baked.

    Attributes:
        tensors: the tensors that are plain now, by qualified name, and what had computed each.
        keys: what became of the state-dict keys.
        normed: those of `tensors` that a weight norm had computed.
        exact: what those of `tensors` that float64 computes alike are before they are rounded.
    """

    tensors: dict[str, str]
    keys: dict[str, str | None]
    normed: tuple[str, ...]
    exact: dict[str, Tensor]

    @property
    def words(self) -> str:
        """What was baked, in words."""
        return "baked " + ", ".join(f"{name} ({kind})" for name, kind in self.tensors.items())

    def unrounded(self) -> Exact:
        """Return `exact` as what computes it."""
        return {name: partial(Tensor.detach, value) for name, value in self.exact.items()}


def computed_tensors(module: nn.Module) -> dict[str, str]:
    """Return which of weight and bias the module computes, each with the name of what does it."""
    if not module._forward_pre_hooks and not has_parametrizations(module):
        return {}  # as with most layers
    new = {key: type(chain[0]).__name__.lstrip("_") for key, chain in _parametrized(module).items()}
    return new | {name: f"old-style {type(hook).__name__}" for name, hook in _old_hooks(module)}


def _parametrized(module: nn.Module) -> dict[str, Any]:
    if not has_parametrizations(module):
        return {}
    return {key: chain for key, chain in module.parametrizations.items() if key in _TENSORS}  # type: ignore[union-attr, operator]  # a ModuleDict, for nn.Module a Tensor or a Module


def has_old_hooks(module: nn.Module) -> bool:
    """Return whether a pre-hook computes weight or bias; what the module holds may be outdated."""
    return any(True for _ in _old_hooks(module))


def _old_hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _OLD):
            yield hook._tensor_name if isinstance(hook, _Pruning) else hook.name, hook


def bake_refusal(captured: Captured, name: str) -> str | None:
    """Return why a call of the module is more than that of a plain layer, baked if need be."""
    module = captured.module(name)
    computed = computed_tensors(module)
    for reason in hook_reasons(module) if computed else captured.hooks(name):
        return reason
    if not computed:
        return None
    kept = set(weight_normed(module))
    for key in computed:
        if key not in kept and any(part.training for part in module.modules()):
            return f"is in training mode, in which its {key} may be computed in another way"
        if key not in kept and is_parametrized(module, key) and not _repeats(module, key):
            return f"computes another {key} at each call"
    for ref in originals(captured, name):
        if tied := captured.tied(ref):
            return f"is made of {ref.name}, which is one tensor with {tied[0].name}"
    return None


def _repeats(module: nn.Module, key: str) -> bool:
    with torch.no_grad():
        return torch.equal(getattr(module, key), getattr(module, key))


def originals(captured: Captured, name: str) -> list[TensorRef]:
    """Return the parameters and buffers of which a module computes its weight or bias."""
    module = captured.module(name)
    if not computed_tensors(module):
        return []
    old = tuple(f"{key}_" for key, _ in _old_hooks(module))
    refs = []
    for key, _ in (*module.named_parameters(), *module.named_buffers()):
        place, _, attr = key.rpartition(".")
        if place.startswith("parametrizations.") or (old and key.startswith(old)):
            refs.append(TensorRef(f"{name}.{place}" if place else name, attr))
    return refs


def bake(captured: Editable, name: str) -> Baked | None:
    """Make the module a plain layer; return what that was, or None if it is one already."""
    module = captured.module(name)
    computed = computed_tensors(module)
    if not computed:
        return None
    places = (name, *captured.aliases(name))
    old = set(module.state_dict())
    normed = set(weight_normed(module))
    exact: dict[str, Tensor] = {}
    for key in computed:
        wide = _in_float64(module, key)
        weight = _bake_tensor(captured.editor, module, key)
        if wide is not None and _alike(weight.detach(), wide):
            captured.editor.refill(weight, wide.to(weight.dtype))
            exact[f"{name}.{key}"] = wide
    gone = old - set(module.state_dict())
    keys: dict[str, str | None] = {}
    for place in places:
        for key in sorted(gone):
            keys[f"{place}.{key}"] = None
        for key in normed:
            direction = {f"{key}_v", f"parametrizations.{key}.original1"} & gone
            keys |= {f"{place}.{part}": f"{place}.{key}" for part in direction}
    tensors = {f"{name}.{key}": kind for key, kind in computed.items()}
    return Baked(tensors, keys, tuple(f"{name}.{key}" for key in sorted(normed)), exact)


def _in_float64(module: nn.Module, key: str) -> Tensor | None:
    """Return what the module computes as `key`, in float64; None if that does not know it."""
    with torch.no_grad(), in_float64(module):
        try:
            if is_parametrized(module, key):
                value = getattr(module, key)
            else:
                (hook,) = (hook for name, hook in _old_hooks(module) if name == key)
                value = _computed(hook, module)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None  # an operator without float64, or another one that a step cannot do there
    wide = isinstance(value, Tensor) and value.dtype == torch.float64 and not value.is_meta
    return value.detach().clone() if wide else None


def _computed(hook: Any, module: nn.Module) -> Any:
    if isinstance(hook, _Pruning):
        return hook.apply_mask(module)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    return hook.compute_weight(module)


def _alike(weight: Tensor, wide: Tensor) -> bool:
    """Return whether two computations of one weight differ by what rounding explains."""
    if weight.shape != wide.shape or weight.dtype not in WIDE:
        return False
    off = (weight.double() - wide).abs().max() if weight.numel() else torch.zeros(())
    return bool(off <= torch.finfo(weight.dtype).eps ** 0.5 * wide.abs().max())


def _bake_tensor(writer: TensorWriter, module: nn.Module, key: str) -> nn.Parameter:
    if is_parametrized(module, key) or key in has_old_weight_norm(module):
        return remove_weight_norm(writer, module, key)
    return writer.remove_hook(module, key)
