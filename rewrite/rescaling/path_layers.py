"""Layers with weights as sums over the paths that end in their units.

    y = W x + b                     |W|ᵖ x ⊕ |b|ᵖ
    batch norm behind it, folded    |s W|ᵖ x ⊕ |t + s b|ᵖ,   s = γ/σ, t = β - s μ
    batch norm as a layer           |γ|ᵖ |1/σ|ᵖ (x ⊕ |μ|ᵖ) ⊕ |β|ᵖ

The first form of a batch norm is that of the folded network. In the second each parameter is an
edge of its own, as derivatives with respect to it require.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.operators import Conv, Linear, Norm, conv_of, linear_of, norm_of
from rewrite.rescaling.folded import FoldedTensors
from rewrite.rescaling.path_algebra import PathAlgebra

Weights = Callable[[TensorRef], Tensor]


class NotHomogeneous(Exception):  # noqa: N818 - control flow; `PathForward` names the line
    """A layer that is not positively homogeneous; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of one captured model, evaluated in one semiring.

    Attributes:
        weights: returns the `power` of a parameter.
        folded: the result of a fold; None: each batch norm is a layer of its own.
    """

    _captured: Captured
    _algebra: PathAlgebra
    _weights: Weights
    _folded: FoldedTensors | None

    def value(self, node: Node, layer: Conv | Linear | Norm, x: Tensor) -> Tensor:
        """Return the ⊕ over all paths that end in the units of a layer.

        Args:
            node: its call.
            layer: what it is.
            x: the value of its input.

        Raises:
            NotHomogeneous: a norm that uses statistics of its input.
        """
        if isinstance(layer, Norm):
            return self._norm(node, layer, x)
        held = {} if self._folded is None else self._folded.of(node)
        power = self._algebra.power
        weight = power(held["weight"]) if "weight" in held else self._weights(layer.weight)
        if isinstance(layer, Linear):
            column: tuple[int, ...] = (-1,)
            result = self._algebra.linear(x, weight)
        else:
            batched = x if x.dim() == layer.dims + 2 else x.unsqueeze(0)
            result = self._conv(layer, batched, weight)
            result = result if batched is x else result.squeeze(0)
            column = (-1, *(1,) * layer.dims)
        if self._takes_bias(node) is not None:
            return result
        if "bias" in held:
            return self._algebra.plus(result, power(held["bias"]).view(column))
        if layer.bias is None:
            return result
        return self._algebra.plus(result, self._weights(layer.bias).view(column))

    def _conv(self, conv: Conv, x: Tensor, weight: Tensor) -> Tensor:
        if conv.padding_mode != "zeros":
            assert conv.module is not None
            module: Any = self._captured.module(conv.module)
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=conv.padding_mode)
            conv = replace(conv, padding=(0,) * conv.dims)
        elif isinstance(conv.padding, str):
            taps = weight.shape[2:]
            if conv.padding == "same":
                pads: list[int] = []
                for tap, dilation in zip(reversed(taps), reversed(conv.dilation), strict=True):
                    whole = dilation * (tap - 1)
                    pads += [whole // 2, whole - whole // 2]
                x = F.pad(x, pads)
            conv = replace(conv, padding=(0,) * conv.dims)
        return self._algebra.conv(conv, x, weight)

    def _takes_bias(self, node: Node) -> Node | None:
        """Return the batch norm that absorbs the bias of a layer, if it alone reads the layer."""
        if self._folded is None or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        norm = None if user in self._folded.passes_on else norm_of(self._captured, user)
        if norm is None or norm.kind != "batch" or norm.training or norm.input is not node:
            return None
        return user

    def _norm(self, node: Node, norm: Norm, x: Tensor) -> Tensor:
        mean, var = norm.running_mean, norm.running_var
        if norm.kind not in ("batch", "instance") or norm.training or mean is None or var is None:
            raise NotHomogeneous(f"{norm.kind} norm normalizes by statistics of its input")
        shape = (-1, *(1,) * (x.dim() - 2)) if x.dim() > 1 else (-1,)
        plus, power = self._algebra.plus, self._algebra.power
        inverse = (self._raw(var) + norm.eps).rsqrt()
        centre = self._raw(mean)
        if self._folded is None:
            scaled = plus(x, power(centre).view(shape)) * power(inverse).view(shape)
            if norm.weight is not None:
                scaled = scaled * self._weights(norm.weight).view(shape)
            return (
                scaled if norm.bias is None else plus(scaled, self._weights(norm.bias).view(shape))
            )
        weight, bias = self._now(node, norm)
        scale = inverse if weight is None else inverse * weight
        if self._takes_bias(norm.input) is node:
            layer = conv_of(self._captured, norm.input) or linear_of(self._captured, norm.input)
            before = None if layer is None else self._now(norm.input, layer)[1]
            centre = centre if before is None else centre - before
        shift = -centre * scale
        if bias is not None:
            shift = shift + bias
        return self._algebra.scaled_plus(x, power(scale), power(shift))

    def _now(self, node: Node, layer: Conv | Linear | Norm) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias of a layer, after the fold if there is one."""
        held = {} if self._folded is None else self._folded.of(node)
        refs = {"weight": layer.weight, "bias": layer.bias}
        own = {
            key: self._raw(ref) for key, ref in refs.items() if ref is not None and key not in held
        }
        both = {**own, **held}
        return both.get("weight"), both.get("bias")

    def _raw(self, ref: TensorRef) -> Tensor:
        return raw(self._captured, ref)


class Powers:
    """The powers of a model's own tensors; those of large ones share one buffer.

    Kernels take more memory than activations, and allocating new memory for each takes as long as
    running the layer. The result for a large kernel is valid until the next call.
    """

    def __init__(self, captured: Captured, algebra: PathAlgebra) -> None:
        self._captured = captured
        self._algebra = algebra
        self._buffer = torch.empty(0, dtype=torch.float64)

    def __call__(self, ref: TensorRef) -> Tensor:
        """Return the `power` of a tensor in float64."""
        tensor = self._captured.tensor(ref).detach()
        if tensor.numel() < _SMALL or not _is_dense(tensor):
            return self._algebra.power(tensor.double())
        if self._buffer.numel() < tensor.numel() or self._buffer.device != tensor.device:
            self._buffer = torch.empty(tensor.numel(), dtype=torch.float64, device=tensor.device)
        flat = tensor.as_strided((tensor.numel(),), (1,))
        room = self._buffer[: tensor.numel()]
        for part, given in zip(torch.split(room, _BLOCK), torch.split(flat, _BLOCK), strict=True):
            self._algebra.power_(part.copy_(given))
        return room.as_strided(tensor.shape, tensor.stride())


_SMALL = 1 << 14
"""Elements below which a tensor gets memory of its own."""

_BLOCK = 1 << 15
"""Elements converted and raised at a time: few enough to stay in the cache."""


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor fill one block of memory, in any order."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized
    return plain and (
        tensor.is_contiguous()
        or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    )


def raw(captured: Captured, ref: TensorRef) -> Tensor:
    """Return a tensor of the model in float64, detached."""
    return captured.tensor(ref).detach().double()
