"""Layers that take up an affine map, and the ledger of the maps that they have taken up.

    kernel   y = W*x + b        behind it: any map; in front of it: any, unless padding adds zeros
    norm     y = s.x + t        a batch norm in eval mode: any map on either side
    gain     y = g.n(x) + h     layer, group, RMS or instance norm: any map behind it

Maps are collected as two short vectors a layer and side. A weight is computed once, from all of
them, when the ledger is written: it is rounded once, whatever was folded into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.algebra import Affine, Layout, absorb
from rewrite.baking import bake_refusal, originals
from rewrite.capture import Captured, TensorRef
from rewrite.operators import Conv, Norm, conv_of, linear_of, norm_of

Side = Literal["in front", "behind"]


@dataclass(frozen=True)
class Layer:
    """A layer that can take up an affine map, by the references of its tensors.

    Attributes:
        name: the qualified name to report.
        kind: "kernel", "norm" or "gain", as in the module's docstring.
        node: one of its calls.
        module: the qualified name of its module; None for a functional call.
        axis: of the channels that it writes, counted from the end where the rank is known.
        keeps_shift: a constant per input channel becomes a constant per output channel.
        why_not: why it does not, if so.
        absorbs: whether its own tensors can take up a map at all.
        call: the one call that is meant, if each call may become a layer of its own.
    """

    name: str
    kind: Literal["kernel", "norm", "gain"]
    node: Node
    module: str | None
    axis: int
    channels_in: int
    channels_out: int
    layout: Layout
    weight: TensorRef | None
    bias: TensorRef | None
    mean: TensorRef | None = None
    var: TensorRef | None = None
    eps: float = 0.0
    keeps_shift: bool = True
    why_not: str = ""
    absorbs: bool = True
    call: Node | None = None

    @property
    def key(self) -> str:
        """What identifies the layer: equal for all calls of one layer."""
        ref = self.weight or self.mean or self.bias
        if self.call is not None:
            return f"{self.module} at {self.call.name}"
        return self.module or (ref.name if ref is not None else self.node.name)


def layer_of(captured: Captured, node: Node, rank: int | None) -> Layer | None:
    """Return the layer that `node` calls, or None; `rank` is that of its input, if known."""
    if (conv := conv_of(captured, node)) is not None:
        return _conv_layer(captured, conv)
    if (linear := linear_of(captured, node)) is not None:
        out, into = captured.tensor(linear.weight).shape
        return Layer(
            linear.target, "kernel", node, linear.module, -1, into, out, Layout(),
            linear.weight, linear.bias,
        )  # fmt: skip
    norm = norm_of(captured, node)
    return None if norm is None else norm_layer(captured, norm, rank)


def _conv_layer(captured: Captured, conv: Conv) -> Layer:
    layout = Layout(conv.groups, conv.transposed)
    weight = captured.tensor(conv.weight)
    why_not = _loses_shift(conv, tuple(weight.shape[2:]))
    return Layer(
        conv.target, "kernel", conv.node, conv.module, -(conv.dims + 1),
        layout.in_channels(weight), layout.out_channels(weight), layout, conv.weight, conv.bias,
        keeps_shift=not why_not, why_not=why_not,
    )  # fmt: skip


def _loses_shift(conv: Conv, taps: tuple[int, ...]) -> str:
    """Return why a constant in front of a convolution is not a constant behind it, or ""."""
    if conv.transposed:
        single = all(tap == 1 for tap in taps) and all(step == 1 for step in conv.stride)
        return (
            ""
            if single
            else (
                f"each output of the transposed convolution {conv.target} reads its own taps, so a "
                "shift in front of it is no constant behind it"
            )
        )
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return ""
    pads = any(tap > 1 for tap in taps) if conv.padding == "same" else any(conv.padding)
    return (
        f"{conv.target} pads its input with zeros (padding={_short(conv.padding)}), and a shift of "
        "the channels would have to shift those too"
        if pads
        else ""
    )


def _short(padding: tuple[int, ...] | str) -> str:
    if isinstance(padding, tuple) and len(set(padding)) == 1:
        return str(padding[0])
    return str(padding)


def norm_layer(captured: Captured, norm: Norm, rank: int | None) -> Layer | None:
    """Return a norm as a layer that takes up maps, or None if it cannot take up any."""
    axis = norm.channel_axis
    if axis >= 0 and rank is not None:
        axis -= rank
    channels = norm.num_features
    if channels is None:
        return None
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    if norm.kind in ("batch", "instance") and has_statistics and not norm.training:
        whole = norm.module is not None or (norm.weight is not None and norm.bias is not None)
        return Layer(
            norm.target, "norm", norm.node, norm.module, axis, channels, channels, Layout(),
            norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, absorbs=whole,
        )  # fmt: skip
    if norm.kind == "batch":
        return None
    if norm.weight is None or len(norm.normalized_shape) > 1:
        return None
    return Layer(
        norm.target, "gain", norm.node, norm.module, axis, channels, channels, Layout(),
        norm.weight, norm.bias, keeps_shift=False,
        why_not=f"{norm.target} normalizes by statistics of its input",
    )  # fmt: skip


Read = Callable[[TensorRef], Tensor]
Write = Callable[[Layer, str, Tensor], object]


class Ledger:
    """What each layer has taken up so far, in float64.

    Args:
        read: returns the tensor of a reference.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._layers: dict[str, Layer] = {}
        self._front: dict[str, Affine] = {}
        self._behind: dict[str, Affine] = {}

    def take(self, layer: Layer, side: Side, affine: Affine) -> None:
        """Note that `layer` takes up `affine` on one side, next to the value it reads or writes."""
        self._layers[layer.key] = layer
        if side == "behind":
            before = self._behind.get(layer.key)
            self._behind[layer.key] = affine if before is None else affine.after(before)
        else:
            before = self._front.get(layer.key)
            self._front[layer.key] = affine if before is None else before.after(affine)

    def affine(self, layer: Layer) -> Affine:
        """Return the map that a batch norm is by now, or the gain and bias of another norm."""
        base = self._base(layer)
        if (front := self._front.get(layer.key)) is not None:
            base = base.after(front.to(base.scale.device))
        if (behind := self._behind.get(layer.key)) is not None:
            base = behind.to(base.scale.device).after(base)
        return base

    def forget(self, layer: Layer) -> None:
        """Drop a norm that is itself folded: what it took up has moved on with it."""
        for held in (self._layers, self._front, self._behind):
            held.pop(layer.key, None)

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers that took up anything, in the order in which they did."""
        return tuple(self._layers.values())

    def _base(self, layer: Layer) -> Affine:
        weight = None if layer.weight is None else self._read(layer.weight)
        bias = None if layer.bias is None else self._read(layer.bias)
        if layer.mean is not None and layer.var is not None:
            mean, var = self._read(layer.mean), self._read(layer.var)
            return Affine.batch_norm(mean, var, weight, bias, layer.eps)
        assert weight is not None
        gain = weight.detach().double()
        return Affine(gain, torch.zeros_like(gain) if bias is None else bias.detach().double())

    def write(self, write: Write) -> None:
        """Compute the new tensors of every layer, one layer at a time, and hand them to `write`."""
        for layer in self._layers.values():
            for attr, tensor in self._new_tensors(layer).items():
                write(layer, attr, tensor)

    def _new_tensors(self, layer: Layer) -> dict[str, Tensor]:
        if layer.kind == "kernel":
            assert layer.weight is not None
            bias = None if layer.bias is None else self._read(layer.bias)
            weight, new_bias = absorb(
                self._read(layer.weight), bias, layer.layout,
                self._behind.get(layer.key), self._front.get(layer.key),
            )  # fmt: skip
            return {"weight": weight} | ({} if new_bias is None else {"bias": new_bias})
        affine = self.affine(layer)
        scale, shift = affine.scale, affine.shift
        if layer.mean is not None and layer.var is not None:
            mean = self._read(layer.mean).detach().double()
            shift = shift + scale * mean
            scale = scale * (self._read(layer.var).detach().double() + layer.eps).sqrt()
        like = layer.weight or layer.mean
        assert like is not None
        dtype = self._read(like).dtype
        new = {"weight": scale.to(dtype)}
        if layer.bias is not None or bool(shift.any()):
            new["bias"] = shift.to(dtype)
        return new


class Uses:
    """Which nodes read each tensor of a captured model: a layer's own calls, or other code.

    `bake` lets a layer whose weight is computed take up a map: it will be a plain one.
    """

    def __init__(self, captured: Captured, bake: bool = False) -> None:
        self._captured = captured
        self._bake = bake
        self._readers: dict[str, list[Node]] = {}
        for node in captured.nodes():
            if node.op == "get_attr":
                self._readers.setdefault(str(node.target), []).extend(node.users)

    def calls(self, layer: Layer) -> tuple[Node, ...]:
        """Return every call of the layer that was traced."""
        if layer.call is not None:
            return (layer.call,)
        if layer.module is not None:
            return self._captured.calls(layer.module)
        assert layer.weight is not None
        return tuple(dict.fromkeys(self._readers.get(layer.weight.name, ())))

    def refusal(self, layer: Layer) -> str | None:
        """Return why the tensors of `layer` must not change, or None, whoever calls it."""
        captured = self._captured
        if layer.module is not None:
            if reason := self.more_than_a_layer(layer.module):
                return f"{layer.name} {reason}"
            if (caller := captured.unknown_caller(layer.module)) is not None:
                return f"{layer.name} may have callers that were not traced: {caller}"
        for ref in (layer.weight, layer.bias):
            if ref is None:
                continue
            if tied := captured.tied(ref):
                return f"{ref.name} is one tensor with {tied[0].name}"
            if layer.module is not None and (reader := self.reader(ref)) is not None:
                return reader
            if layer.module is None and (caller := self._caller(ref)) is not None:
                return caller
            if not captured.tensor(ref).is_floating_point():
                return f"{ref.name} is of dtype {captured.tensor(ref).dtype}"
        if layer.module is None and layer.weight is not None and layer.bias is None:
            return captured.editor.refusal(layer.node)
        return None

    def reader(self, ref: TensorRef, calls: tuple[Node, ...] = ()) -> str | None:
        """Return what reads a tensor itself, beside the functional `calls`, in words, or None."""
        others = [node for node in self._readers.get(ref.name, ()) if node not in calls]
        return f"{ref.name} is also read by {others[0].name} directly" if others else None

    def _caller(self, ref: TensorRef) -> str | None:
        """Return what may read a tensor of a functional layer through the module that holds it.

        A region's root has one code, which was traced, whoever calls it.
        """
        captured = self._captured
        roots = {region.name for region in captured.regions}
        calls = captured.calls(ref.owner)
        others = [call for call in calls if captured.region_of(call).name != ref.owner]
        if others:
            return f"{ref.name} is also read by the call {others[0].name} of its module"
        if calls or ref.owner not in roots:
            caller = captured.opaque_caller(ref.owner)
            return (
                None
                if caller is None
                else (f"{ref.name} may have readers that were not traced: {caller}")
            )
        return None

    def more_than_a_layer(self, name: str) -> str | None:
        """Return why a call of a module is more than that of a plain layer, or None."""
        if not self._bake:
            return next(iter(self._captured.hooks(name)), None)
        if (reason := bake_refusal(self._captured, name)) is not None:
            return reason
        for ref in originals(self._captured, name):
            if others := self._readers.get(ref.name):
                return f"is made of {ref.name}, which is also read by {others[0].name} directly"
        return None
