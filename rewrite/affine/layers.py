"""Layers that absorb an affine map per channel, on their input side or their output side.

    kernel   y = W*x + b        output side: any map; input side: any, unless padding adds zeros
    norm     y = s.x + t        a batch norm in eval mode: any map on either side
    gain     y = g.n(x) + h     layer, group, RMS or instance norm: any map on its output side
    heads    [q; k; v] = W.[x_q; x_k; x_v] + b     multi-head attention keeps three projections
                                in one tensor: a kernel of three groups, on its input side alone
    product  y = W*x + c        c: a bias that other lines compute (BEiT joins those of q and v).
                                The product is a kernel without bias on its input side alone, and
                                the shift that it absorbs is added to c
    vector   y = x + b, min(x, b)       b: a tensor of the model beside a value that is scaled; it
                                takes a scale on its output side alone, with the value

Maps are collected as two short vectors a layer and side. A weight is computed once, from all of
them, when the ledger is written: it is rounded once, whatever was folded into it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd

from rewrite.affine.algebra import KernelLayout
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.operators import (
    NORM_MODULES,
    Conv,
    Norm,
    conv_of,
    linear_of,
    norm_of,
    product_of,
)
from rewrite.graph.spellings import is_plain

_KERNELS = (_ConvNd, nn.Linear)

_OPERANDS = ("query", "key", "value")


class Side(enum.StrEnum):
    """A side of a layer; the values are how maps of keys write it."""

    INPUT = "in front"
    OUTPUT = "behind"


@dataclass(frozen=True)
class Layer:
    """A layer that can absorb an affine map, by the references of its tensors.

    Attributes:
        name: the qualified name to report.
        kind: "kernel", "norm", "gain" or "vector", as in the module's docstring.
        node: one of its calls.
        module: the qualified name of its module; None for a functional call.
        axis: of the channels that it writes, counted from the end where the rank is known.
        keeps_shift: a constant per input channel becomes a constant per output channel.
        why_not: why it does not, if so.
        absorbs: whether its own tensors can absorb a map at all.
        call: the one call that is meant, if each call may become a layer of its own.
        operands: the values that its groups read, where they may be different ones; such a layer
            absorbs a map on its input side alone.
        sizes: how many channels each of them has.
    """

    name: str
    kind: Literal["kernel", "norm", "gain", "vector"]
    node: Node
    module: str | None
    axis: int
    channels_in: int
    channels_out: int
    layout: KernelLayout
    weight: TensorRef | None
    bias: TensorRef | None
    mean: TensorRef | None = None
    var: TensorRef | None = None
    eps: float = 0.0
    keeps_shift: bool = True
    why_not: str = ""
    absorbs: bool = True
    call: Node | None = None
    operands: tuple[Node, ...] = ()
    sizes: tuple[int, ...] = ()

    def reads(self, node: Node, value: Node) -> bool:
        """Return whether `node`, a call of the layer, reads `value` as its data and as no more."""
        if not self.operands:
            return node.all_input_nodes[:1] == [value]
        given = [*node.args, *node.kwargs.values()]
        return value in self.operands and given.count(value) == self.operands.count(value)

    @property
    def key(self) -> str:
        """What identifies the layer: equal for all calls of one layer."""
        ref = self.weight or self.mean or self.bias
        if self.call is not None:
            return f"{self.module} at {self.call.name}"
        return self.module or (ref.name if ref is not None else self.node.name)


def layer_of(captured: Captured, node: Node, rank: int | None) -> Layer | None:
    """Return the layer that `node` calls, or None; `rank` is that of its input, if known."""
    if node.op == "call_module":
        module = captured.module(str(node.target))
        if isinstance(module, NORM_MODULES):
            norm = norm_of(captured, node)
            return None if norm is None else norm_layer(captured, norm, rank)
        if not isinstance(module, _KERNELS):
            return None
    if (conv := conv_of(captured, node)) is not None:
        return _conv_layer(captured, conv)
    if (linear := linear_of(captured, node)) is not None:
        out, into = captured.tensor(linear.weight).shape
        return Layer(
            linear.target, "kernel", node, linear.module, -1, into, out, KernelLayout(),
            linear.weight, linear.bias,
        )  # fmt: skip
    norm = norm_of(captured, node)
    return None if norm is None else norm_layer(captured, norm, rank)


def attention_layer(captured: Captured, node: Node) -> Layer | None:
    """Return the projections of a multi-head attention that `node` calls, as one layer, or None.

    What is added behind them (`add_bias_kv`, `add_zero_attn`, masks) reads no input of theirs.
    """
    given: dict[str, Any] = {}
    weight: TensorRef | None
    bias: TensorRef | None
    if node.op == "call_module":
        module, name = captured.module(str(node.target)), str(node.target)
        if not isinstance(module, nn.MultiheadAttention) or not is_plain(module):
            return None
        sizes = (module.embed_dim, module.kdim, module.vdim)
        weight = None if module.in_proj_weight is None else TensorRef(name, "in_proj_weight")
        bias = TensorRef(name, "in_proj_bias") if module.in_proj_bias is not None else None
    elif node.target is F.multi_head_attention_forward:
        given |= dict(zip(("in_proj_weight", "in_proj_bias"), node.args[5:7], strict=False))
        given |= node.kwargs
        weight, bias = captured.ref(given["in_proj_weight"]), captured.ref(given["in_proj_bias"])
        if weight is None or given.get("use_separate_proj_weight"):
            return None
        name, module = weight.owner, None
        sizes = (captured.tensor(weight).shape[1],) * 3
    else:
        return None
    given |= {**dict(zip(_OPERANDS, node.args, strict=False)), **node.kwargs}
    operands = tuple(given.get(key) for key in _OPERANDS)
    if not all(isinstance(operand, Node) for operand in operands):
        return None
    why_not = f"{name} has no bias to absorb a shift (bias=False)" if bias is None else ""
    if weight is None:
        why_not = f"{name} keeps the projections of query, key and value apart (kdim, vdim)"
    return Layer(
        name, "kernel", node, None if module is None else name, -1, sum(sizes), 3 * sizes[0],
        KernelLayout(groups=3), weight, bias, keeps_shift=bias is not None, why_not=why_not,
        absorbs=weight is not None, operands=cast("tuple[Node, ...]", operands), sizes=sizes,
    )  # fmt: skip


def product_layer(captured: Captured, node: Node) -> Layer | None:
    """Return the product of a linear call whose bias is computed, or None if it is no such call."""
    if (product := product_of(captured, node)) is None:
        return None
    out, into = captured.tensor(product.weight).shape
    return Layer(
        product.target, "kernel", node, None, -1, into, out, KernelLayout(), product.weight, None,
        operands=(product.input,), sizes=(into,),
    )  # fmt: skip


def _conv_layer(captured: Captured, conv: Conv) -> Layer:
    layout = KernelLayout(conv.groups, conv.transposed)
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
    """Return a norm as a layer that absorbs maps, or None if it cannot absorb any."""
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
            norm.target, "norm", norm.node, norm.module, axis, channels, channels, KernelLayout(),
            norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, absorbs=whole,
        )  # fmt: skip
    if norm.kind == "batch":
        return None
    if norm.weight is None or len(norm.normalized_shape) > 1:
        return None
    return Layer(
        norm.target, "gain", norm.node, norm.module, axis, channels, channels, KernelLayout(),
        norm.weight, norm.bias, keeps_shift=False,
        why_not=f"{norm.target} normalizes by statistics of its input",
    )  # fmt: skip
