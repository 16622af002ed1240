"""Random values for a model in the time of a memory copy.

Construction skips every random initializer; `fill` then gives each parameter values of standard
deviation 1/sqrt(fan_in) out of one block of normal noise, and each norm statistics and an affine
map that a wrong rewrite cannot hide behind: mean, beta ~ N(0, 0.2), var, gamma ~ U(0.5, 1.5).
"""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

_NOISE_LENGTH = 1_000_003
_RANDOM_FILLS = frozenset({"uniform_", "normal_", "trunc_normal_", "exponential_", "orthogonal_"})
_IN_PLACE_MATH = frozenset({"erfinv_", "mul_", "add_", "clamp_", "div_", "sub_"})


class SkipRandomInit(TorchFunctionMode):
    """Leave the memory of a randomly initialized tensor as it is: `fill` writes it later.

    In-place arithmetic on such a tensor (the tail of a truncated normal, a rescaled residual
    weight) is skipped as well, because touching the memory is what costs the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._skipped: set[int] = set()
        # It draws again until every value is in range, which memory as it was found never is.
        self._truncated = patch.object(init, "_no_grad_trunc_normal_", _leave)

    def __enter__(self) -> SkipRandomInit:
        self._truncated.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._truncated.stop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_"):
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage().data_ptr()
                random = name in _RANDOM_FILLS or name.startswith(("kaiming_", "xavier_"))
                if random:
                    self._skipped.add(storage)
                if random or (name in _IN_PLACE_MATH and storage in self._skipped):
                    return tensor
        return func(*args, **kwargs)


def _leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def fill(model: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Overwrite the parameters of `model` and the statistics of its norms with random values.

    One-dimensional parameters that hold one repeated value are layer norms' scales, layer scales
    and zero biases: a value at or near zero becomes small noise, any other stays.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(_NOISE_LENGTH, generator=generator)
    cursor = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.is_meta:
                continue
            if parameter.ndim >= 2:
                fan_in = max(parameter[0].numel(), 1)
                cursor = _tile(parameter, noise, gain / math.sqrt(fan_in), cursor)
            elif parameter.ndim == 1 and not _is_scale(parameter):
                cursor = _tile(parameter, noise, 0.1, cursor)
        randomize_norms(model, generator)


def randomize_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Give each module that holds running statistics random statistics and a random affine map."""
    for module in model.modules():
        mean = getattr(module, "running_mean", None)
        var = getattr(module, "running_var", None)
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta:
            continue
        _copy(mean, torch.randn(mean.shape, generator=generator) * 0.2)
        _copy(var, torch.rand(var.shape, generator=generator) + 0.5)
        for name, offset in (("weight", 0.5), ("bias", -0.2)):
            affine = getattr(module, name, None)
            if isinstance(affine, Tensor) and affine.shape == mean.shape:
                spread = 1.0 if name == "weight" else 0.4
                _copy(affine, torch.rand(mean.shape, generator=generator) * spread + offset)


def _copy(target: Tensor, values: Tensor) -> None:
    if target.is_floating_point():
        with torch.no_grad():
            target.copy_(values)


def _is_scale(parameter: Tensor) -> bool:
    first = parameter.flatten()[0]
    return bool((parameter == first).all()) and abs(float(first)) > 1e-2


def _tile(parameter: Tensor, noise: Tensor, std: float, cursor: int) -> int:
    """Write `std` times the noise from `cursor` on into `parameter`; return the next cursor."""
    total = parameter.numel()
    in_place = parameter.is_contiguous() and parameter.dtype == noise.dtype
    flat = parameter.data.view(-1) if in_place else torch.empty(total)
    written = 0
    while written < total:
        count = min(total - written, len(noise) - cursor)
        torch.mul(noise[cursor : cursor + count], std, out=flat[written : written + count])
        written += count
        cursor = (cursor + count) % len(noise)
    if not in_place:
        parameter.copy_(flat.view(parameter.shape))
    return cursor
