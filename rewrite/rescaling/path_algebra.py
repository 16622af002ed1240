"""The two semirings in which the norm of all paths is one forward of a network.

    sum of powers    x ⊕ y = x + y,       |w|ᵖ in place of w      Σ over paths of |product|ᵖ
    largest          x ⊕ y = max(x, y),   |w| in place of w       max over paths of |product|

Both are semirings over numbers ≥ 0; 0 is the neutral element of ⊕, and products distribute over ⊕,
so one forward adds up exponentially many paths. Graphs are handled elsewhere (`path_forward`).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewrite.graph.operators import Conv

_CONV: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


_CONV_TRANSPOSE: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


_ADAPTIVE_MEAN: Mapping[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d,
}  # fmt: skip


_ADAPTIVE_MAX: Mapping[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


_MAX_POOL: Mapping[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class Window:
    """The windows of a pooling layer, one number per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool


class PathAlgebra(ABC):
    """How the values of paths that meet are combined; all values are float64 and ≥ 0."""

    @abstractmethod
    def power(self, weight: Tensor) -> Tensor:
        """Return the value of a weight as an edge: |w|ᵖ, or |w|."""

    @abstractmethod
    def plus(self, one: Tensor, other: Tensor) -> Tensor:
        """Return one ⊕ other, broadcast."""

    @abstractmethod
    def power_(self, weight: Tensor) -> Tensor:
        """Replace a tensor by its `power` in place, and return it."""

    @abstractmethod
    def scaled_plus(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return x · scale ⊕ shift channel by channel; scale and shift are powers.

        Args:
            x: (N, C, *space), or (C,).
            scale, shift: (C,).
        """

    @abstractmethod
    def reduce(self, x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
        """Return the ⊕ over axes."""

    @abstractmethod
    def conv(self, conv: Conv, x: Tensor, weight: Tensor) -> Tensor:
        """Return the ⊕ over the products of a convolution without bias, zero-padded.

        Args:
            conv: its hyperparameters; `padding` is a tuple.
            x: (N, in, *space).
            weight: `power` of its weight.
        """

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the ⊕ over i of weight[o, i] · x[…, i]; `weight` is a `power`."""

    @abstractmethod
    def pool(self, x: Tensor, window: Window) -> Tensor:
        """Return the ⊕ over each window of x (N, C, *space); padding adds nothing."""

    @abstractmethod
    def adaptive(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the ⊕ over the windows of an adaptive pool to `size`."""

    @abstractmethod
    def norm(self, total: Tensor) -> Tensor:
        """Return the path norm, given the ⊕ over all outputs: its p-th root, or itself."""


@dataclass(frozen=True)
class PowerSum(PathAlgebra):
    """Σ over paths of |product of weights|ᵖ, for a finite p > 0."""

    p: float

    def power(self, weight: Tensor) -> Tensor:
        """Return |w|ᵖ."""
        if self.p == 2:
            return weight * weight
        return weight.abs() if self.p == 1 else weight.abs().pow(self.p)

    def power_(self, weight: Tensor) -> Tensor:
        """Return |w|ᵖ, in the memory of w."""
        if self.p == 2:
            return weight.mul_(weight)
        return weight.abs_() if self.p == 1 else weight.abs_().pow_(self.p)

    def scaled_plus(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return x · scale + shift, as a norm of mean 0 and variance 1: one pass over x."""
        if x.dim() < 2:
            return x * scale + shift
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(x, zeros, ones, scale, shift, eps=0.0)

    def plus(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the sum."""
        return one + other

    def reduce(self, x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
        """Return the sum over axes."""
        return x.sum(tuple(dims), keepdim=keepdim)

    def conv(self, conv: Conv, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of x with |w|ᵖ."""
        if conv.transposed:
            return _CONV_TRANSPOSE[conv.dims](
                x, weight, None, conv.stride, conv.padding, conv.output_padding, conv.groups,
                conv.dilation,
            )  # fmt: skip
        return _CONV[conv.dims](
            x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x Wᵀ."""
        return F.linear(x, weight)

    def pool(self, x: Tensor, window: Window) -> Tensor:
        """Return the sum over each window: an average that divides by 1."""
        channels, dims = x.shape[1], x.dim() - 2
        # The last window of a pool in ceil mode may reach over the edge, where nothing is added.
        shape = _MAX_POOL[dims](
            x[:1, :1], window.kernel, window.stride, window.padding, window.dilation,
            window.ceil_mode,
        ).shape[2:]  # fmt: skip
        pads: list[int] = []
        for axis in reversed(range(dims)):
            reach = (shape[axis] - 1) * window.stride[axis] + 1
            reach += window.dilation[axis] * (window.kernel[axis] - 1)
            before = window.padding[axis]
            pads += [before, reach - before - x.shape[2 + axis]]
        padded = F.pad(x, pads)
        if dims > 1 and set(window.dilation) == {1}:
            pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
            return pool(padded, window.kernel, window.stride, divisor_override=1)
        ones = x.new_ones(channels, 1, *window.kernel)
        return _CONV[dims](padded, ones, None, window.stride, 0, window.dilation, channels)

    def adaptive(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the sum over each window: its mean times the number of its values."""
        return _ADAPTIVE_MEAN[len(size)](x, tuple(size)) * adaptive_counts(x, size)

    def norm(self, total: Tensor) -> Tensor:
        """Return the p-th root."""
        return total if self.p == 1 else total.pow(1 / self.p)


@dataclass(frozen=True)
class Largest(PathAlgebra):
    """The largest |product of weights| of any path: p = ∞."""

    def power(self, weight: Tensor) -> Tensor:
        """Return |w|."""
        return weight.abs()

    def power_(self, weight: Tensor) -> Tensor:
        """Return |w|, in the memory of w."""
        return weight.abs_()

    def scaled_plus(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return the larger of x · scale and shift."""
        shape = (-1, *(1,) * (x.dim() - 2)) if x.dim() > 1 else (-1,)
        return torch.maximum(x * scale.view(shape), shift.view(shape))

    def plus(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the larger."""
        return torch.maximum(one, other)

    def reduce(self, x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
        """Return the largest along axes."""
        return x.amax(tuple(dims), keepdim=keepdim)

    def conv(self, conv: Conv, x: Tensor, weight: Tensor) -> Tensor:
        """Return the largest product of each output, tap by tap."""
        assert isinstance(conv.padding, tuple)
        taps, groups = weight.shape[2:], conv.groups
        if conv.transposed:
            x = _spread(conv, x, taps)
            axes = tuple(range(3, 3 + conv.dims))
            kernel = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flip(axes)
            stride = (1,) * conv.dims
        else:
            x = F.pad(x, [pad for size in reversed(conv.padding) for pad in (size, size)])
            kernel = weight.view(groups, -1, *weight.shape[1:])
            stride = conv.stride
        space = [
            (x.shape[2 + axis] - conv.dilation[axis] * (taps[axis] - 1) - 1) // stride[axis] + 1
            for axis in range(conv.dims)
        ]
        result = x.new_zeros(x.shape[0], groups, kernel.shape[1], math.prod(space))
        for tap in itertools.product(*map(range, taps)):
            place: tuple[Any, ...] = (Ellipsis, *tap)
            starts = [t * d for t, d in zip(tap, conv.dilation, strict=True)]
            cut: tuple[Any, ...] = tuple(
                slice(start, start + step * (size - 1) + 1, step)
                for start, step, size in zip(starts, stride, space, strict=True)
            )
            seen = x[(Ellipsis, *cut)]
            _take_tap(result, kernel[place], seen.reshape(len(x), groups, -1, math.prod(space)))
        return result.view(x.shape[0], -1, *space)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the largest product of each output."""
        rows = [(row * weight).amax(-1) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).view(*x.shape[:-1], weight.shape[0])

    def pool(self, x: Tensor, window: Window) -> Tensor:
        """Return the largest of each window."""
        return _MAX_POOL[x.dim() - 2](
            x, window.kernel, window.stride, window.padding, window.dilation, window.ceil_mode
        )

    def adaptive(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the largest of each window."""
        return _ADAPTIVE_MAX[len(size)](x, tuple(size))

    def norm(self, total: Tensor) -> Tensor:
        """Return the largest itself."""
        return total


def _take_tap(result: Tensor, weight: Tensor, seen: Tensor) -> None:
    """Raise `result` (N, groups, out, space) to the products with one tap.

    One input channel at a time, into one buffer: several times as fast as many at once.

    Args:
        result: written in place.
        weight: (groups, out, in).
        seen: (N, groups, in, space).
    """
    buffer = torch.empty_like(result)
    for channel in range(weight.shape[2]):
        torch.mul(weight[:, :, channel, None], seen[:, :, None, channel], out=buffer)
        torch.maximum(result, buffer, out=result)


def adaptive_counts(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return how many values each window of an adaptive pool of x to `size` holds: (*size,)."""
    counts = x.new_ones(())
    for axis, out in enumerate(size):
        length = x.shape[2 + axis]
        edges = torch.arange(out, device=x.device, dtype=torch.int64)
        first, last = edges * length // out, -(-(edges + 1) * length // out)
        counts = counts.unsqueeze(-1) * (last - first).to(x.dtype)
    return counts


def _spread(conv: Conv, x: Tensor, taps: Sequence[int]) -> Tensor:
    """Return the input whose plain convolution is a transposed one: zeros between and around."""
    assert isinstance(conv.padding, tuple)
    space = [(x.shape[2 + i] - 1) * conv.stride[i] + 1 for i in range(conv.dims)]
    wide = x.new_zeros(*x.shape[:2], *space)
    cells: tuple[Any, ...] = tuple(slice(None, None, step) for step in conv.stride)
    wide[(Ellipsis, *cells)] = x
    pads: list[int] = []
    for axis in reversed(range(conv.dims)):
        around = conv.dilation[axis] * (taps[axis] - 1) - conv.padding[axis]
        pads += [around, around + conv.output_padding[axis]]
    return F.pad(wide, pads)
