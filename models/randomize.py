"""Give every normalization of a model statistics and affines that a test can tell apart.

A fresh BatchNorm is close to the identity, so that any wrong rewrite of it passes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# PyTorch has no common base for its normalizations; this one holds BatchNorm and InstanceNorm.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_TINY = 1e-30


def randomize_norms_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize gamma, beta, mean and variance of every normalization, in place.

    Found are normalization modules, and every module with a pair of 1-d buffers `*mean` and `*var`:
    subclasses and functional norms, in plain lists and dicts too. Variances that are zero or next
    to it, and gammas that are zero or negative already, stay: a model that has them is about them.
    Parametrized tensors stay as well.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in walk(model):
            _randomize_(module, generator)
    return model


def walk(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once, those in plain lists, tuples and dicts included."""
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        item = pending.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item
            pending.extend(item._modules.values())
            pending.extend(vars(item).values())
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)


def _randomize_(module: nn.Module, generator: torch.Generator) -> None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    statistics = dict(_statistics(module))
    if not statistics and not isinstance(module, _NORMS):
        return
    for name, buffer in statistics.items():
        if name.endswith("mean"):
            _fill_(buffer, torch.randn(buffer.shape, generator=generator) * 0.5)
        else:
            drawn = torch.rand(buffer.shape, generator=generator) * 2 + 0.3
            _fill_(buffer, torch.where(buffer.cpu().abs() < _TINY, buffer.cpu(), drawn))
    shapes = {buffer.shape for buffer in statistics.values()}
    for name, parameter in parameters.items():
        if shapes and parameter.shape not in shapes:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name in ("bias", "beta", "shift"):
            _fill_(parameter, noise * 0.5)
            continue
        drawn = (0.5 + torch.rand(parameter.shape, generator=generator)) * torch.where(
            noise < -0.8, -1.0, 1.0
        )
        old = parameter.cpu()
        _fill_(parameter, torch.where(old <= 0, old, drawn) if bool((old == 0).any()) else drawn)


def _statistics(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, mean in module._buffers.items():
        other = name[: -len("mean")] + "var"
        var = module._buffers.get(other)
        if name.endswith("mean") and mean is not None and var is not None and mean.dim() == 1:
            yield name, mean
            yield other, var


def _fill_(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values.to(tensor.dtype))
