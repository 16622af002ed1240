"""The ledger: which affine maps a tensor has absorbed so far, on either side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine, See, absorbed_bias, absorbed_weight
from rewrite.affine.layers import Layer, Side
from rewrite.graph.captured import TensorRef

Read = Callable[[TensorRef], Tensor]


Write = Callable[[Layer, str, Tensor], object]


class Ledger:
    """What each layer has absorbed so far, in float64.

    Args:
        read: returns the tensor of a reference.
        unrounded: what tensors that were computed before are in float64; they are taken as that.
        keeps_zero_bias: whether a layer without bias gets one even if it is zero: what keys there
            are then depends on the graph alone, and not on the values of a checkpoint.
    """

    def __init__(
        self,
        read: Read,
        unrounded: Mapping[str, Callable[[], Tensor]] | None = None,
        *,
        keeps_zero_bias: bool = False,
    ) -> None:
        self._read = read
        self._unrounded = unrounded or {}
        self._keeps_zero_bias = keeps_zero_bias
        self._layers: dict[str, Layer] = {}
        self._input: dict[str, Affine] = {}
        self._output: dict[str, Affine] = {}

    def take(self, layer: Layer, side: Side, affine: Affine) -> None:
        """Note that `layer` absorbs `affine` on one side, next to the value it reads or writes."""
        self._layers[layer.key] = layer
        if side is Side.OUTPUT:
            before = self._output.get(layer.key)
            self._output[layer.key] = affine if before is None else affine.after(before)
        else:
            before = self._input.get(layer.key)
            self._input[layer.key] = affine if before is None else before.after(affine)

    def affine(self, layer: Layer) -> Affine:
        """Return the map that a batch norm is by now, or the gain and bias of another norm."""
        base = self._base(layer)
        if (before := self._input.get(layer.key)) is not None:
            base = base.after(before.to(base.scale.device))
        if (after := self._output.get(layer.key)) is not None:
            base = after.to(base.scale.device).after(base)
        return base

    def forget(self, layer: Layer) -> None:
        """Drop a norm that is itself folded: what it absorbed has moved on with it."""
        for held in (self._layers, self._input, self._output):
            held.pop(layer.key, None)

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers that absorbed anything, in the order in which they did."""
        return tuple(self._layers.values())

    def _base(self, layer: Layer) -> Affine:
        weight = None if layer.weight is None else self._value(layer.weight)
        bias = None if layer.bias is None else self._value(layer.bias)
        if layer.mean is not None and layer.var is not None:
            mean, var = self._read(layer.mean), self._read(layer.var)
            return Affine.batch_norm(mean, var, weight, bias, layer.eps)
        assert weight is not None
        gain = weight.detach().double()
        return Affine(gain, torch.zeros_like(gain) if bias is None else bias.detach().double())

    def write(self, write: Write) -> None:
        """Compute the new tensors of every layer, one layer at a time, and hand them to `write`."""
        for layer in self._layers.values():
            for attr, tensor in self.new_tensors(layer).items():
                write(layer, attr, tensor)

    def new_tensors(self, layer: Layer, see: See | None = None) -> dict[str, Tensor]:
        """Return the new weight of a layer, if it has one, and its bias if it has or needs one.

        Each is rounded once. `see` is shown all of the weight of a kernel.
        """
        like = layer.weight or layer.mean or layer.bias
        assert like is not None
        dtype = self._read(like).dtype
        if layer.kind == "vector":
            return {"bias": self.exact(layer, "bias").to(dtype)}
        if layer.kind == "kernel":
            new = {"weight": self._kernel(layer, dtype, see)}
        else:
            new = {"weight": self.exact(layer, "weight").to(dtype)}
        shift = self.exact(layer, "bias")
        if layer.bias is not None or self._keeps_zero_bias or self._shifts(layer, shift):
            new["bias"] = shift.to(dtype if layer.bias is None else self._read(layer.bias).dtype)
        return new

    def _shifts(self, layer: Layer, shift: Tensor) -> bool:
        """Return whether a new bias is not zero; by the maps alone where tensors have no values."""
        if not shift.is_meta:
            return bool(shift.any())
        maps = (self._input.get(layer.key), self._output.get(layer.key))
        return any(m is not None and (m.shift.is_meta or m.adds) for m in maps)

    def exact(self, layer: Layer, attr: str) -> Tensor:
        """Return the new weight or bias of a layer in float64, before it is rounded."""
        if layer.kind == "kernel":
            if attr == "weight":
                return self._kernel(layer, torch.float64)
            assert layer.weight is not None
            bias = None if layer.bias is None else self._value(layer.bias)
            return absorbed_bias(
                self._value(layer.weight), bias, layer.layout,
                self._output.get(layer.key), self._input.get(layer.key),
            )  # fmt: skip
        if layer.kind == "vector":
            assert layer.bias is not None
            held = self._value(layer.bias).detach().double()
            scale = self._output[layer.key].scale.to(held.device)
            return held * scale.view(held.shape)
        affine = self.affine(layer)
        scale, shift = affine.scale, affine.shift
        if layer.mean is not None and layer.var is not None:
            mean = self._read(layer.mean).detach().double()
            shift = shift + scale * mean
            scale = scale * (self._read(layer.var).detach().double() + layer.eps).sqrt()
        return scale if attr == "weight" else shift

    def _kernel(self, layer: Layer, dtype: torch.dtype, see: See | None = None) -> Tensor:
        assert layer.weight is not None
        return absorbed_weight(
            self._value(layer.weight), layer.layout,
            self._output.get(layer.key), self._input.get(layer.key), dtype, see,
        )  # fmt: skip

    def _value(self, ref: TensorRef) -> Tensor:
        """Return a tensor as it is stored, or as it was before it was rounded."""
        known = self._unrounded.get(ref.name)
        return self._read(ref) if known is None else known()

    def alone(self, layer: Layer) -> Ledger:
        """Return a ledger of this layer only, which holds the tensors that the layer has now."""
        refs = (layer.weight, layer.bias, layer.mean, layer.var)
        held = {ref: self._read(ref) for ref in refs if ref is not None}
        exact = {ref.name: self._value(ref) for ref in held if ref.name in self._unrounded}
        ledger = Ledger(
            held.__getitem__, {name: partial(Tensor.detach, t) for name, t in exact.items()}
        )
        ledger._layers[layer.key] = layer
        for mine, maps in ((ledger._input, self._input), (ledger._output, self._output)):
            if layer.key in maps:
                mine[layer.key] = maps[layer.key]
        return ledger
