"""Recognize convolutions, linear layers, norms and activations in a graph, however spelled.

One operator has many spellings: a module, a subclass that inherits its forward, a
`torch.nn.functional` call, a `torch.*` function, an `aten` overload of an exported program. Each
function here reads one node and returns one description, under PyTorch's names, with the tensors as
`TensorRef`: a pass is written once against these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.spellings import (
    ACTIVATION_MODULES,
    ACTIVATION_NAMES,
    CONVOLUTION,
    CONVS,
    LINEAR,
    LINEARS,
    NORMS,
    aten,
    is_plain,
)
from rewrite.graph.traits import operation

if TYPE_CHECKING:
    from rewrite.graph.spellings import NormKind


@dataclass(frozen=True)
class Operator:
    """What every description shares.

    Attributes:
        node: the call.
        target: the qualified name to report: the layer itself, or the module that holds the
            tensors of a function call (in an exported program, the layer that it once was), or
            whose forward holds the line.
        input: the node of the first argument.
        module: the qualified name of the layer if the node calls one, else None.
    """

    node: Node
    target: str
    input: Node
    module: str | None


@dataclass(frozen=True)
class Norm(Operator):
    """A normalization. `training` is whether it normalizes by the statistics of its batch."""

    kind: NormKind
    weight: TensorRef | None
    bias: TensorRef | None
    running_mean: TensorRef | None
    running_var: TensorRef | None
    eps: float
    training: bool
    num_features: int | None
    num_groups: int | None = None
    normalized_shape: tuple[int, ...] = ()
    momentum: float | None = None
    spatial_axes: int | None = None
    """Axes behind the channels, where the class says how many: batches or none before them."""

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in the input: 1, or the last for layer and RMS norms."""
        if self.spatial_axes is not None:
            return -1 - self.spatial_axes
        return -1 if self.kind in ("layer", "rms") else 1


@dataclass(frozen=True)
class Conv(Operator):
    """A convolution, or a transposed one.

    The weight is (out, in/groups, *kernel), or (in, out/groups, *kernel) if transposed.
    """

    weight: TensorRef
    bias: TensorRef | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str
    dims: int


@dataclass(frozen=True)
class Linear(Operator):
    """y = x Wᵀ + b over the last axis; weight is (out, in)."""

    weight: TensorRef
    bias: TensorRef | None


@dataclass(frozen=True)
class Activation(Operator):
    """An elementwise nonlinearity, by its functional name ("relu", "leaky_relu", "gelu" …)."""

    name: str
    negative_slope: float | None = None

    @property
    def by_value(self) -> bool:
        """Whether it works on each value alone, and alike in all channels."""
        return self.name not in ("softmax", "log_softmax", "glu", "prelu")


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""By their spatial axes; an input may have no batch axis."""

NORM_MODULES = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""The norms of torch.nn."""


def norm_of(captured: Captured, node: Node) -> Norm | None:
    """Return the normalization that `node` calls, or None."""
    if node.op == "call_module":
        return _norm_module(captured, node)
    if node.op != "call_function" or node.target not in NORMS:
        return None
    kind, names = NORMS[node.target]
    call = _bind(node, names)
    if not isinstance(call["input"], Node):
        return None
    refs = {
        key: captured.ref(call.get(key))
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    if any(isinstance(call.get(key), Node) and refs[key] is None for key in refs):
        return None  # a computed parameter: nothing to read it from
    training = bool(call.get("training", call.get("use_input_stats", kind != "batch")))
    if node.target is F.batch_norm or node.target is torch.batch_norm:
        training = training or refs["running_mean"] is None
    shape = call.get("normalized_shape") or ()
    return Norm(
        node, _holder(captured, node, *refs.values()), call["input"], None, kind, **refs,
        eps=_default(call.get("eps"), 1e-5),
        training=training,
        num_features=_length(captured, refs),
        num_groups=call.get("num_groups"),
        normalized_shape=tuple(shape) if isinstance(shape, list | tuple) else (),
        momentum=call.get("momentum"), spatial_axes=None,
    )  # fmt: skip


def _norm_module(captured: Captured, node: Node) -> Norm | None:
    name = str(node.target)
    module = captured.module(name)
    if not isinstance(module, NORM_MODULES) or not is_plain(module):
        return None
    described = norm_module(captured, name, module)
    inputs = node.all_input_nodes
    if described is None or not inputs:
        return None
    return Norm(node, name, inputs[0], name, **described)


def norm_module(captured: Captured, name: str, module: nn.Module) -> dict[str, Any] | None:
    """Return the fields of the `Norm` that a standard layer is, or None."""
    if not isinstance(module, NORM_MODULES):
        return None
    keys = ("weight", "bias", "running_mean", "running_var")
    held = {key: getattr(module, key, None) for key in keys}
    if any(is_lazy(value) for value in held.values() if value is not None):
        return None
    refs = {key: None if value is None else TensorRef(name, key) for key, value in held.items()}
    if isinstance(module, _BatchNorm):
        training = module.training or held["running_mean"] is None
        return dict(
            kind="batch", eps=module.eps, training=training, momentum=module.momentum,
            num_features=module.num_features, **refs,
        )  # fmt: skip
    if isinstance(module, _InstanceNorm):
        training = module.training or not module.track_running_stats
        axes = (n for n, kind in enumerate(_INSTANCE_NORMS, 1) if isinstance(module, kind))
        return dict(
            kind="instance", eps=module.eps, training=training, momentum=module.momentum,
            num_features=module.num_features, spatial_axes=next(axes, None), **refs,
        )  # fmt: skip
    if isinstance(module, nn.GroupNorm):
        return dict(
            kind="group", eps=module.eps, training=True, num_groups=module.num_groups,
            num_features=module.num_channels, **refs,
        )  # fmt: skip
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        shape = tuple(module.normalized_shape)
        return dict(
            kind=kind, eps=_default(module.eps, torch.finfo(torch.float32).eps), training=True,
            num_features=shape[-1], normalized_shape=shape, **refs,
        )  # fmt: skip
    return None


def needs_weight(captured: Captured, norm: str) -> bool:
    """Return whether the module around a norm hands its weight to a fast path of its own."""
    around = {place.rpartition(".")[0] for place in (norm, *captured.aliases(norm))}
    kinds = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
    return any(isinstance(captured.module(name), kinds) for name in around)


def conv_of(captured: Captured, node: Node) -> Conv | None:
    """Return the convolution (transposed too) that `node` calls, or None."""
    if node.op == "call_module":
        return _conv_module(captured, node)
    if node.op != "call_function":
        return None
    if node.target is aten.convolution.default:
        call = _bind(node, CONVOLUTION)
        dims, transposed = len(call["stride"]), bool(call["transposed"])
    elif node.target in CONVS:
        dims, transposed, names = CONVS[node.target]
        call = _bind(node, names)
    else:
        return None
    weight, bias = captured.ref(call.get("weight")), captured.ref(call.get("bias"))
    if weight is None or (bias is None and isinstance(call.get("bias"), Node)):
        return None
    padding = call.get("padding", 0)
    return Conv(
        node, _holder(captured, node, weight), call["input"], None, weight, bias,
        stride=_tuple(call.get("stride", 1), dims),
        padding=padding if isinstance(padding, str) else _tuple(padding, dims),
        dilation=_tuple(call.get("dilation", 1), dims),
        groups=call.get("groups", 1), transposed=transposed,
        output_padding=_tuple(call.get("output_padding", 0), dims),
        padding_mode="zeros", dims=dims,
    )  # fmt: skip


def _conv_module(captured: Captured, node: Node) -> Conv | None:
    name = str(node.target)
    module = captured.module(name)
    if not isinstance(module, _ConvNd) or not is_plain(module) or is_lazy(module.weight):
        return None
    inputs = node.all_input_nodes
    if not inputs:
        return None
    padding = module.padding
    return Conv(
        node, name, inputs[0], name, TensorRef(name, "weight"),
        TensorRef(name, "bias") if module.bias is not None else None,
        stride=tuple(module.stride),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(module.dilation), groups=module.groups,
        transposed=isinstance(module, _ConvTransposeNd),
        output_padding=tuple(module.output_padding), padding_mode=module.padding_mode,
        dims=len(module.kernel_size),
    )  # fmt: skip


def linear_of(captured: Captured, node: Node) -> Linear | None:
    """Return the linear layer that `node` calls, or None."""
    if node.op == "call_module":
        name = str(node.target)
        module = captured.module(name)
        inputs = node.all_input_nodes
        if not isinstance(module, nn.Linear) or not is_plain(module) or not inputs:
            return None
        if is_lazy(module.weight):
            return None
        bias = TensorRef(name, "bias") if module.bias is not None else None
        return Linear(node, name, inputs[0], name, TensorRef(name, "weight"), bias)
    if node.op != "call_function" or node.target not in LINEARS:
        return None
    call = _bind(node, LINEAR)
    weight, bias_ref = captured.ref(call.get("weight")), captured.ref(call.get("bias"))
    if weight is None or (bias_ref is None and isinstance(call.get("bias"), Node)):
        return None
    target = _holder(captured, node, weight)
    return Linear(node, target, call["input"], None, weight, bias_ref)


def product_of(captured: Captured, node: Node) -> Linear | None:
    """Return the product of a linear call whose bias is computed by other lines, or None."""
    if node.op != "call_function" or node.target not in LINEARS:
        return None
    call = _bind(node, LINEAR)
    weight, bias = captured.ref(call.get("weight")), call.get("bias")
    if weight is None or not isinstance(bias, Node) or captured.ref(bias) is not None:
        return None
    return Linear(node, _holder(captured, node, weight), call["input"], None, weight, None)


def activation_of(captured: Captured, node: Node) -> Activation | None:
    """Return the elementwise nonlinearity that `node` calls, or None."""
    inputs = node.all_input_nodes
    if not inputs:
        return None
    if node.op == "call_module":
        name = str(node.target)
        module = captured.module(name)
        kind = next((k for k in ACTIVATION_MODULES if isinstance(module, k)), None)
        if kind is None or not is_plain(module):
            return None
        slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else None
        return Activation(node, name, inputs[0], name, ACTIVATION_MODULES[kind], slope)
    row = operation(node)
    if row is None or row.name not in ACTIVATION_NAMES:
        return None
    called = row.name
    slope = None
    if called == "leaky_relu":
        given = _bind(node, ("input", "negative_slope")).get("negative_slope", 0.01)
        slope = float(given) if isinstance(given, int | float) else None
    return Activation(node, captured.owner(node), inputs[0], None, called, slope)


def _bind(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the call's arguments by name, those left out missing."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _holder(captured: Captured, node: Node, *refs: TensorRef | None) -> str:
    """Return the module to report a call of a function by: the one that holds its tensors."""
    return next((ref.owner for ref in refs if ref is not None), captured.owner(node))


def _default(value: Any, default: float) -> float:
    return default if value is None else float(value)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)


def _length(captured: Captured, refs: Mapping[str, TensorRef | None]) -> int | None:
    """Return the number of channels, read off the first parameter that is there."""
    for ref in refs.values():
        if ref is not None:
            return captured.tensor(ref).numel()
    return None
