"""Tools that fold or replace norms, each called as its users call it, on a copy of the model.

The two walkers are written anew: they do what the helpers of mmcv, mmdetection, YOLO and many timm
forks do, which is to walk the children of each module and to fold a norm into the convolution that
was *registered* last.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

Folder = Callable[[nn.Module, tuple[Any, ...]], Any]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def ours(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold by `passes.FoldNorm`."""
    from passes import FoldNorm
    from rewrite.protocol import apply_pass

    return apply_pass(FoldNorm(), model, inputs).model


def torch_fx(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold by torch.fx.experimental.optimization.fuse."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def fuse_fx(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold by torch.ao.quantization.fuse_fx."""
    from torch.ao.quantization.quantize_fx import fuse_fx as fuse

    return fuse(model)


def fuse_modules(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold by torch.ao.quantization.fuse_modules, over the pairs that are registered in a row."""
    from torch.ao.quantization import fuse_modules as fuse

    pairs: list[list[str]] = []
    for prefix, parent in model.named_modules():
        children = list(parent.named_children())
        for (one, first), (other, second) in itertools.pairwise(children):
            layer = isinstance(first, (*_CONVS, nn.Linear))
            if layer and isinstance(second, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                join = f"{prefix}." if prefix else ""
                pairs.append([join + one, join + other])
    return fuse(model, pairs) if pairs else model


def pt2e(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold by torchao's pt2e `_fuse_conv_bn_`, on the exported program."""
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    exported = torch.export.export(model, inputs).module()
    _fuse_conv_bn_(exported)
    return exported


def optimum(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold by optimum.fx, both of its transformations."""
    from optimum.fx.optimization import (
        FuseBatchNorm1dInLinear,
        FuseBatchNorm2dInConv2d,
        compose,
    )

    traced = torch.fx.symbolic_trace(model)
    return compose(FuseBatchNorm2dInConv2d(), FuseBatchNorm1dInLinear())(traced)


def exact_type_walker(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold each norm into the convolution registered before it, as mmcv's `fuse_conv_bn` does."""
    return _walk(model, lambda m: type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))


def subclass_walker(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Do the same for whatever is an instance of a norm."""
    return _walk(model, lambda m: isinstance(m, nn.modules.batchnorm._BatchNorm))


def _walk(module: nn.Module, is_norm: Callable[[nn.Module], bool]) -> nn.Module:
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    last: Any = None
    child: Any
    for name, child in list(module.named_children()):
        if is_norm(child) and last is not None:
            weight, bias = fuse_conv_bn_weights(
                last.weight, last.bias, child.running_mean, child.running_var, child.eps,
                child.weight, child.bias,
            )  # fmt: skip
            last.weight, last.bias = weight, bias
            module._modules[name] = nn.Identity()
            last = None
        elif isinstance(child, _CONVS):
            last = child
        else:
            _walk(child, is_norm)
    return module


def timm_reparameterize(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Merge by timm's `reparameterize_model`, which knows the blocks that offer it."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


FOLDERS: dict[str, Folder] = {
    "ours": ours,
    "torch.fx fuse": torch_fx,
    "fuse_fx": fuse_fx,
    "fuse_modules": fuse_modules,
    "torchao pt2e": pt2e,
    "optimum.fx": optimum,
    "exact-type walker": exact_type_walker,
    "subclass walker": subclass_walker,
}


def our_swap(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Replace every BatchNorm by `passes.BatchNormToGroupNorm`."""
    from passes import BatchNormToGroupNorm
    from rewrite.protocol import apply_pass

    return apply_pass(BatchNormToGroupNorm(), model, inputs).model


def opacus(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Replace every BatchNorm by Opacus' ModuleValidator.fix."""
    from opacus.validators import ModuleValidator

    logging.getLogger("opacus").setLevel(logging.ERROR)
    return ModuleValidator.fix(model)


def swap_walker(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Replace BatchNorm2d by a new GroupNorm with setattr, as most posted snippets do."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            groups = 32 if child.num_features % 32 == 0 else 1
            setattr(model, name, nn.GroupNorm(groups, child.num_features))
        else:
            swap_walker(child, inputs)
    return model


SWAPPERS: dict[str, Folder] = {"ours": our_swap, "Opacus": opacus, "setattr walker": swap_walker}

_PACKAGES = {"torchao pt2e": "torchao", "optimum.fx": "optimum", "Opacus": "opacus"}


def installed(folders: dict[str, Folder]) -> tuple[dict[str, Folder], list[str]]:
    """Return the tools whose package is there, and a line on each that is not."""
    from importlib.metadata import PackageNotFoundError

    found, missing = {}, []
    for name, folder in folders.items():
        try:
            version(_PACKAGES.get(name, "torch"))
        except PackageNotFoundError:
            missing.append(f"{name}: skipped, {_PACKAGES[name]} is not installed")
        else:
            found[name] = folder
    return found, missing


def versions() -> tuple[str, ...]:
    """Return the packages of the tools that are installed."""
    from importlib.metadata import PackageNotFoundError

    found = []
    for package in ("timm", *_PACKAGES.values()):
        try:
            version(package)
        except PackageNotFoundError:
            continue
        found.append(package)
    return tuple(found)


def clone(model: nn.Module) -> nn.Module:
    """Return what a tool may destroy."""
    return copy.deepcopy(model)
