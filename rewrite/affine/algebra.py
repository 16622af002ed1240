"""The algebra of folding: per-channel affine maps, and the kernels that absorb them.

    layer(x) = W*x + b             W: a convolution, transposed convolution or linear map

    output side    s.(W*x + b) + t  =  (s.W)*x + (s.b + t)            always
    input side     W*(s.x + t) + b  =  (W.s)*x + (b + sum_ik W_oik t_i)

The second holds where every output position reads the same taps: a linear map, or a convolution
whose padding adds no zeros (or t = 0). Everything is computed in float64 and rounded once, into the
dtype, device and memory layout of the old tensor. Nothing here knows about graphs or modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_BLOCK = 1 << 17
"""Elements converted to float64 at a time: few enough to stay in the cache, enough for several
threads and to make the cost of a call of no account."""


See = Callable[[Tensor], object]
"""Is shown a new weight block by block, as each is made: it is in the cache then."""


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift per channel, in float64."""

    scale: Tensor
    shift: Tensor

    @cached_property
    def finite(self) -> bool:
        """Whether every scale and every shift is a number."""
        # One infinity or NaN makes the sum of all products one, too; so may large numbers.
        if math.isfinite(torch.dot(self.scale, self.shift)):
            return True
        return bool((self.scale.isfinite() & self.shift.isfinite()).all())

    @cached_property
    def scales(self) -> bool:
        """Whether it multiplies any channel by another number than 1."""
        return _first(self.scale, 1.0) != 1 or bool((self.scale != 1).any())

    @cached_property
    def adds(self) -> bool:
        """Whether it adds anything to any channel."""
        return _first(self.shift, 0.0) != 0 or bool(self.shift.any())

    @cached_property
    def positive(self) -> bool:
        """Whether every scale is positive."""
        return not len(self.scale) or float(self.scale.min()) > 0

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """Return y = x on `channels` channels."""
        return cls(
            torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        )

    @classmethod
    def batch_norm(
        cls,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Affine:
        """Return what a batch normalization computes from its running statistics."""
        scale = (var.detach().double() + eps).rsqrt_()
        if weight is not None:
            scale.mul_(weight.detach())
        shift = torch.mul(scale, mean.detach()).neg_()
        if bias is not None:
            shift.add_(bias.detach())
        return cls(scale, shift)

    def after(self, first: Affine) -> Affine:
        """Return the map x -> self(first(x))."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def part(self, scale: bool, shift: bool) -> Affine:
        """Return the map with its scale, its shift, or both."""
        if scale and shift:
            return self
        return Affine(
            self.scale if scale else torch.ones_like(self.scale),
            self.shift if shift else torch.zeros_like(self.shift),
        )

    def inverse(self) -> Affine:
        """Return the map that undoes this one; every scale has to differ from zero."""
        scale = self.scale.reciprocal()
        return Affine(scale, -self.shift * scale)

    def at(self, index: Tensor) -> Affine:
        """Return the map of the channels in `index`; an index of -1 stands for the identity."""
        channels = torch.arange(len(self.scale), device=index.device)
        if torch.equal(index, channels):
            return self
        index = index.to(self.scale.device)
        inside = index >= 0
        safe = index.clamp(min=0)
        return Affine(
            torch.where(inside, self.scale[safe], 1.0), torch.where(inside, self.shift[safe], 0.0)
        )

    def to(self, device: torch.device) -> Affine:
        """Return the same map on `device`."""
        return Affine(self.scale.to(device), self.shift.to(device))


@dataclass(frozen=True)
class KernelLayout:
    """How a weight is laid out: (out, in/groups, *taps); transposed (in, out/groups, *taps)."""

    groups: int = 1
    transposed: bool = False

    def in_channels(self, weight: Tensor) -> int:
        """Return how many channels the kernel reads."""
        return weight.shape[0] if self.transposed else weight.shape[1] * self.groups

    def out_channels(self, weight: Tensor) -> int:
        """Return how many channels the kernel writes."""
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]


def _first(vector: Tensor, default: float) -> float:
    """Return the first number of a vector: it mostly decides whether any differs from a number."""
    return float(vector[0]) if len(vector) else default


def scale_weight(
    weight: Tensor,
    layout: KernelLayout,
    output_side: Tensor | None,
    input_side: Tensor | None,
    dtype: torch.dtype | None = None,
    see: See | None = None,
) -> Tensor:
    """Return the weight of `output_side . (W * (input_side . x))`, rounded once.

    The dtype is that of the weight, unless another is given. `see` is shown all of the result.
    """
    rows, columns = (input_side, output_side) if layout.transposed else (output_side, input_side)
    source = weight.detach()
    result = torch.empty_like(source, dtype=dtype)  # first: what is freed leaves no hole below it
    taps = (1,) * (source.dim() - 2)
    by_row = None if rows is None else rows.view(-1, 1, *taps)
    by_group = None if columns is None else columns.view(layout.groups, -1, *taps)
    group = None
    if layout.groups > 1 and by_group is not None:
        group = torch.arange(len(source), device=source.device) // (len(source) // layout.groups)
    if source.numel() <= _BLOCK:
        columns = by_group if by_group is None or group is None else by_group[group]
        result.copy_(_scaled(source.to(torch.float64, copy=True), by_row, columns))
        if see is not None:
            see(result)
        return result
    step = max(1, _BLOCK // (source.numel() // source.shape[0]))
    # One buffer that stays in the cache: fresh temporaries cost more than the arithmetic.
    buffer = torch.empty_like(source[:step], dtype=torch.float64)
    for start in range(0, len(source), step):
        part = slice(start, start + step)
        block = source[part]
        columns = by_group if by_group is None or group is None else by_group[group[part]]
        exact = _scaled(
            buffer[: len(block)].copy_(block), None if by_row is None else by_row[part], columns
        )
        rounded = result[part].copy_(exact)
        if see is not None:
            see(rounded)
    return result


def _scaled(exact: Tensor, *factors: Tensor | None) -> Tensor:
    for factor in factors:
        if factor is not None:
            exact.mul_(factor)
    return exact


def shift_through(weight: Tensor, layout: KernelLayout, shift: Tensor) -> Tensor:
    """Return W * (a constant `shift` per input channel): one float64 value per output channel.

    A transposed kernel has to have a single tap: with more, its output is not constant.
    """
    taps = tuple(range(2, weight.dim()))
    summed = weight.detach().sum(taps, dtype=torch.float64) if taps else weight.detach().double()
    if layout.transposed:
        grouped = summed.view(layout.groups, -1, summed.shape[1])
        return (grouped * shift.view(layout.groups, -1, 1)).sum(1).flatten()
    grouped = summed.view(layout.groups, -1, summed.shape[1])
    return (grouped * shift.view(layout.groups, 1, -1)).sum(2).flatten()


def absorb(
    weight: Tensor,
    bias: Tensor | None,
    layout: KernelLayout,
    output_side: Affine | None = None,
    input_side: Affine | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of `output_side(W * input_side(x) + b)`, each rounded once.

    The bias stays None where it had been and would be zero.
    """
    shift = absorbed_bias(weight, bias, layout, output_side, input_side)
    new_weight = absorbed_weight(weight, layout, output_side, input_side)
    if bias is None and not bool(shift.any()):
        return new_weight, None
    return new_weight, shift.to(weight.dtype if bias is None else bias.dtype)


def absorbed_weight(
    weight: Tensor,
    layout: KernelLayout,
    output_side: Affine | None,
    input_side: Affine | None,
    dtype: torch.dtype | None = None,
    see: See | None = None,
) -> Tensor:
    """Return the weight of `output_side(W * input_side(x) + b)`, rounded to `dtype` or its own.

    `see` is shown all of it.
    """
    device = weight.device
    return scale_weight(
        weight,
        layout,
        None if output_side is None else output_side.scale.to(device),
        None if input_side is None else input_side.scale.to(device),
        dtype,
        see,
    )


def absorbed_bias(
    weight: Tensor,
    bias: Tensor | None,
    layout: KernelLayout,
    output_side: Affine | None,
    input_side: Affine | None,
) -> Tensor:
    """Return the bias of `output_side(W * input_side(x) + b)` in float64."""
    old = weight.detach()
    shift = torch.zeros(layout.out_channels(old), dtype=torch.float64, device=old.device)
    if bias is not None:
        shift = shift + bias.detach().double().to(old.device)
    if input_side is not None and bool(input_side.shift.any()):
        shift = shift + shift_through(old, layout, input_side.shift.to(old.device))
    if output_side is not None:
        output_side = output_side.to(old.device)
        shift = output_side.scale * shift + output_side.shift
    return shift


# --- parallel kernels ---------------------------------------------------------------------------


def dirac(channels: int, groups: int, taps: Sequence[int], at: Sequence[int]) -> Tensor:
    """Return the float64 kernel of the identity: one at tap `at` of each channel's own input."""
    per_group = channels // groups
    kernel = torch.zeros(channels, per_group, *taps, dtype=torch.float64)
    rows = torch.arange(channels)
    kernel[(rows, rows % per_group, *(torch.full_like(rows, tap) for tap in at))] = 1.0
    return kernel


def embed(kernel: Tensor, taps: Sequence[int], at: Sequence[int]) -> Tensor:
    """Return `kernel` with zeros around it: its first tap stands at `at` of a grid of `taps`."""
    result = kernel.new_zeros(*kernel.shape[:2], *taps)
    window = tuple(
        slice(start, start + size) for start, size in zip(at, kernel.shape[2:], strict=True)
    )
    result[(slice(None), slice(None), *window)] = kernel
    return result


def offset(inner: tuple[int, int], outer: tuple[int, int], dilation: int) -> int | None:
    """Return where a kernel's first tap lies in a larger one, along one axis; None if nowhere.

    Each kernel is (taps, padding). Both have to see the same input window for each output:
    p_outer - p_inner = offset * dilation on the left, and the same output size on the right.
    """
    (inner_taps, inner_pad), (outer_taps, outer_pad) = inner, outer
    left = outer_pad - inner_pad
    if left < 0 or left % dilation:
        return None
    position = left // dilation
    if position + inner_taps > outer_taps:
        return None
    same_size = 2 * inner_pad - dilation * (inner_taps - 1) == 2 * outer_pad - dilation * (
        outer_taps - 1
    )
    return position if same_size else None
