"""The only code that writes a module's parameters, buffers and parametrizations.

`Editor` extends it by the modules of a captured model, which have names, and by lines of code. A
tensor is exchanged and never written in place: its storage may be shared with the model that the
user keeps. (`refill` gives a parameter another storage: whoever holds that parameter follows.)
What a module keeps beside its tensors follows them: the list of weights of a recurrent layer, and
the `affine` of a norm, which says whether it has a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

_AFFINE_FLAGS = ("affine", "elementwise_affine")


class TensorWriter:
    """Writes tensors of modules, whether or not they belong to a captured model."""

    # -- tensors ------------------------------------------------------------------------------

    def write(
        self, module: nn.Module, key: str, value: Tensor | None, requires_grad: bool | None = None
    ) -> None:
        """Put `value`, detached, where `key` of a module is; None leaves the place empty.

        A buffer stays a buffer, all else is a parameter. Where `requires_grad` is not given, a
        parameter keeps its own, and a new one takes that of another parameter of the module.
        """
        held = _holds(module, key)
        if key in module._buffers:
            module._buffers[key] = None if value is None else value.detach()
            return
        if value is None:
            module._parameters[key] = None
            _follow(module, key, held)
            return
        old = module._parameters.get(key)
        if old is None:
            old = next((p for p in module._parameters.values() if p is not None), None)
        if requires_grad is None:
            requires_grad = old.requires_grad if old is not None else value.is_floating_point()
        module.register_parameter(key, nn.Parameter(value.detach(), requires_grad))
        _follow(module, key, held)

    def share(self, module: nn.Module, key: str, tensor: Tensor | None) -> None:
        """Let a module hold this very parameter, or this very tensor as a buffer, as `key`."""
        held = _holds(module, key)
        if key in module._buffers:
            module._buffers[key] = tensor
        elif tensor is None or isinstance(tensor, nn.Parameter):
            module.register_parameter(key, tensor)
        else:
            module.register_buffer(key, tensor)
        _follow(module, key, held)

    def refill(self, parameter: Tensor, value: Tensor) -> None:
        """Give a parameter the storage of `value`: every module that holds it sees the change."""
        parameter.data = value.detach()

    def restore(self, module: nn.Module, held: Mapping[str, Tensor]) -> None:
        """Give the tensors of a module, by their keys in its state dict, the values `held`."""
        current = module.state_dict(keep_vars=True)
        for key, value in held.items():
            self.refill(current[key], value)

    def copied(self, module: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
        """Return a module like `module` that holds the very same tensors, but for `tensors`."""
        new = copy.copy(module)
        new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
        like = module._parameters.get("weight")
        for key, value in tensors.items():
            self.write(new, key, value, None if like is None else like.requires_grad)
        return new

    # -- what computes a tensor ---------------------------------------------------------------

    def parametrize(
        self, module: nn.Module, key: str, step: nn.Module, requires_grad: bool
    ) -> parametrize.ParametrizationList:
        """Compute `key` of a module by `step` from its `right_inverse`, and return the originals.

        The originals require a gradient as `requires_grad` says.
        """
        own_class(module, parametrized_keys(module))
        # `unsafe` skips a trial run on the live parameter; shapes and dtypes are ours to get right.
        parametrize.register_parametrization(module, key, step, unsafe=True)
        chain = module.get_submodule(f"parametrizations.{key}")
        assert isinstance(chain, parametrize.ParametrizationList)
        module.get_submodule("parametrizations").train(module.training)
        for parameter in chain.parameters():
            parameter.requires_grad_(requires_grad)
        if isinstance(module, nn.RNNBase):
            track_flat_weights(module)
        return chain

    def assign_through(self, module: nn.Module, key: str, value: Tensor) -> None:
        """Give the originals of a parametrized `key` what the parametrization's inverse makes."""
        setattr(module, key, value)

    def unparametrize(self, module: nn.Module, key: str) -> nn.Parameter:
        """Make what the parametrizations of `key` compute now a plain parameter, and return it."""
        chain = module.get_submodule(f"parametrizations.{key}")
        requires_grad = any(parameter.requires_grad for parameter in chain.parameters())
        with torch.no_grad():
            weight = nn.Parameter(getattr(module, key).clone(), requires_grad=requires_grad)
        left = tuple(other for other in parametrized_keys(module) if other != key)
        del module.parametrizations[key]  # type: ignore[union-attr, operator]  # a ModuleDict, for nn.Module a Tensor or a Module
        own_class(module, left)
        module.register_parameter(key, weight)
        _follow(module, key, held=True)
        return weight

    def remove_hook(self, module: nn.Module, key: str) -> nn.Parameter:
        """Make what an old-style hook computes of `NAME_orig` a plain parameter, and return it.

        For spectral norm and pruning; a weight norm has two sources, which `take_sources` returns.
        """
        requires_grad = getattr(module, f"{key}_orig").requires_grad
        hooks = module._forward_pre_hooks.values()
        if any(isinstance(hook, OldSpectralNorm) and hook.name == key for hook in hooks):
            nn.utils.remove_spectral_norm(module, key)
        else:
            prune.remove(module, key)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        weight = nn.Parameter(getattr(module, key).detach(), requires_grad=requires_grad)
        module.register_parameter(key, weight)
        return weight

    def take_sources(self, module: nn.Module, key: str) -> tuple[nn.Parameter, nn.Parameter, int]:
        """Take an old-style weight norm of `key` off; return its g, v and dim.

        The module is left without a tensor of that name.

        Raises:
            KeyError: it has no such weight norm.
        """
        for number, hook in module._forward_pre_hooks.items():
            if isinstance(hook, OldWeightNorm) and hook.name == key:
                del module._forward_pre_hooks[number]
                break
        else:
            raise KeyError(key)
        module.__dict__.pop(key, None)
        g, v = module._parameters.pop(f"{key}_g"), module._parameters.pop(f"{key}_v")
        assert g is not None and v is not None  # the old style registers both
        return g, v, int(hook.dim)


def parametrized_keys(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors that parametrizations compute."""
    if not parametrize.is_parametrized(module):
        return ()
    return tuple(module.parametrizations)  # type: ignore[arg-type]  # a ModuleDict, for nn.Module a Tensor or a Module


def own_class(module: nn.Module, keys: tuple[str, ...]) -> None:
    """Give a parametrized module a class of its own, with properties for `keys` alone.

    PyTorch makes a class for each parametrized module, but a deep copy shares it with the original,
    and `register_parametrization` and `remove_parametrizations` edit it: they would break the
    original, which is why neither is called on a module that is parametrized already.
    """
    if not isinstance(module._modules.get("parametrizations"), nn.ModuleDict):
        return
    module.__class__ = type(module).__mro__[1]
    if not keys:
        del module._modules["parametrizations"]
        return
    parametrize._inject_new_class(module)
    for key in keys:
        parametrize._inject_property(module, key)
    if isinstance(module, nn.RNNBase):
        track_flat_weights(module)


def track_flat_weights(module: nn.RNNBase) -> None:
    """Make a recurrent layer compute its weights at each call.

    RNNBase keeps a list of its weights beside the parameters; with a parametrization the list
    would hold the tensors of the day of registration, and training would change nothing.
    """
    type(module)._flat_weights = property(_flat_weights, _ignore)  # type: ignore[assignment]  # a property in the place of a list
    unknown = [None] * len(module._flat_weights_names)
    module.__dict__["_flat_weights"] = unknown  # read by RNNBase.__setstate__ alone
    module._flat_weight_refs = list(unknown)


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _ignore(module: nn.RNNBase, value: Any) -> None:
    """Ignore what RNNBase keeps: it would be the weights of before the last step."""


def _holds(module: nn.Module, key: str) -> bool:
    """Return whether a module has a tensor of that name."""
    return any(held.get(key) is not None for held in (module._parameters, module._buffers))


def _follow(module: nn.Module, key: str, held: bool) -> None:
    """Bring what a module keeps beside its tensor `key` up to date; `held`: whether it had one."""
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        module._init_flat_weights()
    if key != "weight" or held == _holds(module, key):
        return
    for flag in _AFFINE_FLAGS:
        if isinstance(getattr(module, flag, None), bool):
            setattr(module, flag, not held)
