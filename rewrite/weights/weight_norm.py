"""Weight normalization by output unit, for every layout, and back again.

    w = v * (g / ||v||)        the norm over the inputs and the kernel of each output unit
    dL/dg = (dL/dw . v) / ||v||
    dL/dv = g / ||v|| * dL/dw - g * (dL/dg) / ||v||^2 * v

(Salimans & Kingma 2016, equations 2 and 3.) It sits in PyTorch's own parametrization machinery,
under the keys that `torch.nn.utils.parametrizations.weight_norm` uses (`original0` is g,
`original1` is v), so checkpoints of the two load into each other. The computation is our own,
because PyTorch's differs from the weight it was given by 2 ulp in float32, normalizes the input
channels of a transposed convolution, and divides a zero row by zero. Here:

1. g / ||v|| is exactly 1 after registration, in every dtype: the norm in the forward is the same
   rounded number as the g that was stored, and w comes back bit for bit.
2. A zero row gets g = 0 and a random direction v, so that w is zero and can still learn. (With
   v = 0 the gradient of g would be 0 / 0, and with v = 1 it would vanish behind a LayerNorm.)
3. A row whose squares underflow or overflow is rescaled before its norm is taken.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from rewrite.graph.tensor_writer import TensorWriter, parametrized_keys, track_flat_weights
from rewrite.nn.weight_norm import WeightNorm
from rewrite.weights.fans import linear_maps
from rewrite.weights.layout import Layout


def weight_refusal(module: nn.Module, key: str) -> str | None:
    """Return why weight `key` of a layer cannot be weight-normed, or None."""
    if has_weight_norm(module, key):
        return "is weight-normed already"
    if parametrize.is_parametrized(module, key):
        return "has another parametrization"
    weight = module._parameters.get(key)
    if weight is None:
        return "is no parameter of the layer"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "is lazy; run the model once first"
    if type(weight.data) is not torch.Tensor or weight.is_quantized:
        return "is quantized, or of another tensor class; weight norm needs a plain tensor"
    if not weight.is_floating_point():
        return f"is {str(weight.dtype).removeprefix('torch.')}; weight norm needs floating point"
    if weight.numel() == 0:
        return "is empty"
    if getattr(module, "sparse", False):
        return "has sparse gradients"
    if getattr(module, "max_norm", None) is not None:
        return "is rescaled in place by max_norm"
    return None


# -- one weight of one module ----------------------------------------------------------------------


def weight_layouts(module: nn.Module) -> dict[str, Layout]:
    """Return the layout of each weight of `module` that has output units, by parameter name."""
    return {m.parameter: m.layout for m in linear_maps(module)}


def has_weight_norm(module: nn.Module, name: str) -> bool:
    """Return whether weight `name` is weight-normed in the new form (ours or PyTorch's)."""
    if not parametrize.is_parametrized(module, name):
        return False
    return isinstance(_chain(module, name)[0], WeightNorm | TorchWeightNorm)


def _chain(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    chain = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def weight_normed(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of `module` that are weight-normed, in either form."""
    new = [name for name in parametrized_keys(module) if has_weight_norm(module, name)]
    return (*new, *has_old_weight_norm(module))


def has_old_weight_norm(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of `module` that are weight-normed in the old form."""
    return tuple(hook.name for hook in _old_hooks(module).values())


def weight_norm_sources(module: nn.Module, name: str) -> tuple[int, int]:
    """Return the identities of the g and v behind a weight-normed weight."""
    g, v = weight_norm_tensors(module, name)
    return id(g), id(v)


def weight_norm_tensors(module: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the g and v behind a weight-normed weight."""
    held, keys = module, (f"{name}_g", f"{name}_v")
    if name not in has_old_weight_norm(module):
        held, keys = _chain(module, name), ("original0", "original1")
    g, v = (getattr(held, key) for key in keys)
    return g, v


def weight_norm_step(module: nn.Module, name: str) -> nn.Module:
    """Return what computes a weight-normed weight: of its own form, or of the old one."""
    for hook in _old_hooks(module).values():
        if hook.name == name:
            return _of_dim(hook.dim)
    return _chain(module, name)[0]


def _old_hooks(module: nn.Module) -> dict[int, WeightNormHook]:
    return {k: h for k, h in module._forward_pre_hooks.items() if isinstance(h, WeightNormHook)}


def add_weight_norm(writer: TensorWriter, module: nn.Module, name: str, layout: Layout) -> None:
    """Reparameterize weight `name` of `module`; its value does not change.

    The new g and v require a gradient if the weight did.
    """
    requires_grad = getattr(module, name).requires_grad
    # With the outputs on axis 0 the groups are blocks of rows, and every row is a unit anyway.
    groups = layout.groups if layout.inputs_first else 1
    _register(writer, module, name, WeightNorm(groups, layout.inputs_first), requires_grad)


def _register(
    writer: TensorWriter, module: nn.Module, name: str, step: nn.Module, requires_grad: bool
) -> nn.Module:
    """Compute weight `name` by a weight norm; return what holds its g and v."""
    chain = writer.parametrize(module, name, step, requires_grad)
    complete_weight_norm(module, name)
    return chain


def complete_weight_norm(module: nn.Module, name: str) -> None:
    """Give a module with a weight-normed `name` what no file holds: hook and property."""
    if isinstance(module, nn.RNNBase):
        track_flat_weights(module)
    module.register_load_state_dict_pre_hook(_LoadsOldKeys(name))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def is_weight_norm_hook(hook: Any) -> bool:
    """Return whether a load hook of a module is one that `complete_weight_norm` makes."""
    return isinstance(getattr(hook, "hook", hook), _LoadsOldKeys)


def share_weight_norm(
    writer: TensorWriter, first: nn.Module, name: str, second: nn.Module, other: str
) -> None:
    """Tie weight `other` of `second` to the weight-normed weight `name` of `first`."""
    source, copied = _chain(first, name), copy.deepcopy(_chain(first, name)[0])
    chain = _register(writer, second, other, copied, False)
    for key in ("original0", "original1"):
        writer.share(chain, key, source._parameters[key])


def remove_weight_norm(writer: TensorWriter, module: nn.Module, name: str) -> nn.Parameter:
    """Bake the weight-normed weight `name` of `module` into a plain parameter, and return it."""
    if name not in has_old_weight_norm(module):
        _drop_load_hook(module, name)
        return writer.unparametrize(module, name)
    g, v, dim = writer.take_sources(module, name)
    with torch.no_grad():
        value = _of_dim(dim)(g, v)
    weight = nn.Parameter(value.clone(), requires_grad=g.requires_grad or v.requires_grad)
    writer.share(module, name, weight)
    return weight


def _drop_load_hook(module: nn.Module, name: str) -> None:
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        ours = isinstance(hook, _LoadsOldKeys) and hook.name == name
        # PyTorch's own hook is a closure over the name.
        theirs = getattr(hook, "__name__", "") == "_weight_norm_compat_hook" and name in (
            cell.cell_contents for cell in hook.__closure__ or ()
        )
        if ours or theirs:
            del hooks[key]


def _of_dim(dim: int) -> nn.Module:
    """Return the parametrization of an old-style `dim`."""
    if dim in (0, 1):
        return WeightNorm(inputs_first=dim == 1)
    return TorchWeightNorm(dim)


def convert_old_weight_norm(writer: TensorWriter, module: nn.Module, name: str) -> None:
    """Turn an old-style weight norm of `name` into the new form, on the same two parameters.

    Raises:
        KeyError: there is none.
    """
    g, v, dim = writer.take_sources(module, name)
    writer.write(module, name, torch.ones_like(v), requires_grad=True)
    chain = _register(writer, module, name, _of_dim(dim), True)
    writer.share(chain, "original0", g)
    writer.share(chain, "original1", v)


class _LoadsOldKeys:
    """Lets `weight_g` and `weight_v` of an old checkpoint load into the new form.

    PyTorch uses a closure here, which no pickle holds.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        g, v = f"{prefix}{self.name}_g", f"{prefix}{self.name}_v"
        if g in state_dict and v in state_dict:
            new = f"{prefix}parametrizations.{self.name}.original"
            state_dict[f"{new}0"] = state_dict.pop(g)
            state_dict[f"{new}1"] = state_dict.pop(v)
