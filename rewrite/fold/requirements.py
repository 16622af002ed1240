"""What a plan relies on of the numbers that it moves: made with it, checked at each use of it.

    y = s.x + t        s, t finite
    scales             else s = 1
    adds               else t = 0: zero padding and RMS norms let no shift pass
    positive           s > 0: max pooling and ReLU let no other scale pass
    invertible         2^-20 <= |s| <= 2^20 in a type that keeps 24 bits: a layer absorbs 1/s

Planning decides with the numbers of one checkpoint; a recipe is run on those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine
from rewrite.affine.layers import Layer
from rewrite.graph.captured import TensorRef

SMALLEST_SCALE = 2.0**-20
"""Where an inverse is taken, each |s| lies between this and its reciprocal: nothing overflows, and
float32 keeps its relative precision (each channel is scaled by one number)."""


_KEEPS_24_BITS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Requirements:
    """What has to hold of a map y = s.x + t; the names stand in the module's docstring."""

    scales: bool = True
    adds: bool = True
    positive: bool = False
    invertible: bool = False

    def broken_by(self, affine: Affine, dtype: torch.dtype = torch.float64) -> str:
        """Return what of `affine`, made of tensors of `dtype`, breaks them, in words, or ""."""
        if not affine.finite:
            return "scale or shift is not finite"
        if not self.adds and affine.adds:
            return "adds something, and the plan moves no shift"
        if not self.scales and affine.scales:
            return "scales, and the plan moves no scale"
        if self.positive and not affine.positive:
            return "has a scale that is not positive, which max pooling or ReLU does not let pass"
        if self.invertible and (reason := uninvertible(affine, dtype)):
            return f"{reason}, and another layer would absorb the inverse"
        return ""


def narrowest(layers: Iterable[Layer], read: Callable[[TensorRef], Tensor]) -> torch.dtype:
    """Return the type with the fewest bits among those of the layers' tensors; else float64."""
    refs = [layer.weight or layer.mean or layer.bias for layer in layers]
    dtypes = {read(ref).dtype for ref in refs if ref is not None}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def uninvertible(affine: Affine, dtype: torch.dtype) -> str:
    """Return why the inverse of a map cannot be absorbed without losing precision, or ""."""
    size = affine.scale.abs()
    if bool((size == 0).any()):
        return "has a scale of zero"
    if bool((size < SMALLEST_SCALE).any() or (size > 1 / SMALLEST_SCALE).any()):
        return "has a scale of nearly zero, or a huge one"
    return "" if dtype in _KEEPS_24_BITS else f"is stored in {dtype}"


def culprit(layer: Layer, read: Callable[[TensorRef], Tensor]) -> str:
    """Return which tensor of a norm makes its map no map, in words, or ""."""
    for ref in (layer.weight, layer.bias, layer.mean, layer.var):
        if ref is not None and not bool(torch.isfinite(read(ref)).all()):
            return f"{ref.name} holds values that are not finite"
    if layer.var is not None:
        lowest = float(read(layer.var).detach().double().min())
        if lowest + layer.eps <= 0:
            return _negative(layer.var.name, lowest, layer.eps)
    if layer.weight is not None and bool((read(layer.weight) <= 0).any()):
        value = float(read(layer.weight).detach().double().min())
        return f"{layer.weight.name} holds {value:.3g}"
    return ""


def broken_statistics(mean: tuple[str, Tensor], var: tuple[str, Tensor], eps: float) -> str:
    """Return which running statistic makes (x - mean) / sqrt(var + eps) no map, or "".

    A channel whose variance and eps are both zero is none: it was constant in training, and
    whoever moves the statistics says what becomes of it.

    Args:
        mean, var: the name of each tensor, and the tensor; on the meta device nothing is known.
        eps: what is added to the variance.
    """
    for name, tensor in (mean, var):
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return f"{name} holds values that are not finite"
    name, tensor = var
    if tensor.is_meta or not tensor.numel():
        return ""
    lowest = float(tensor.detach().double().min())
    return _negative(name, lowest, eps) if lowest + eps < 0 else ""


def _negative(name: str, lowest: float, eps: float) -> str:
    return f"{name} is negative ({lowest:.3g}, and eps is {eps:g})"
