"""Every spelling of a layer (module, function, aten operator), and the plain name of a call.

The operations between layers stand in `rewrite.graph.traits`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from rewrite.tracing.tracer import is_leaf

NormKind = Literal["batch", "group", "layer", "instance", "rms"]


aten = torch.ops.aten


# -- spellings --------------------------------------------------------------------------------

_F_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


_T_BATCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")


_LEGIT = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")


_INSTANCE = (
    "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
)  # fmt: skip


_T_INSTANCE = (
    "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps",
)  # fmt: skip


_GROUP = ("input", "num_groups", "weight", "bias", "eps")


_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")


_RMS = ("input", "normalized_shape", "weight", "eps")


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


_CONV_T = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


CONVOLUTION = (
    "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups",
)  # fmt: skip


LINEAR = ("input", "weight", "bias")


def _norm_spellings() -> dict[Any, tuple[NormKind, tuple[str, ...]]]:
    return {
        F.batch_norm: ("batch", _F_BATCH),
        torch.batch_norm: ("batch", _T_BATCH),
        aten.batch_norm.default: ("batch", _T_BATCH),
        aten.cudnn_batch_norm.default: ("batch", _T_BATCH),
        aten._native_batch_norm_legit_no_training.default: ("batch", _LEGIT),
        aten._native_batch_norm_legit.default: ("batch", _T_BATCH),
        aten.native_batch_norm.default: ("batch", _T_BATCH),
        F.instance_norm: ("instance", _INSTANCE),
        torch.instance_norm: ("instance", _T_INSTANCE),
        aten.instance_norm.default: ("instance", _T_INSTANCE),
        F.group_norm: ("group", _GROUP),
        torch.group_norm: ("group", _GROUP),
        aten.group_norm.default: ("group", _GROUP),
        F.layer_norm: ("layer", _LAYER),
        torch.layer_norm: ("layer", _LAYER),
        aten.layer_norm.default: ("layer", _LAYER),
        aten.native_layer_norm.default: ("layer", _LAYER),
        F.rms_norm: ("rms", _RMS),
        torch.rms_norm: ("rms", _RMS),
        aten.rms_norm.default: ("rms", _RMS),
    }


def _conv_spellings() -> dict[Any, tuple[int, bool, tuple[str, ...]]]:
    table: dict[Any, tuple[int, bool, tuple[str, ...]]] = {}
    for dims in (1, 2, 3):
        plain, transposed = f"conv{dims}d", f"conv_transpose{dims}d"
        packet, packet_t = getattr(aten, plain), getattr(aten, transposed)
        for target in (getattr(F, plain), getattr(torch, plain), packet.default, packet.padding):
            table[target] = (dims, False, _CONV)
        overload = packet_t.default if dims == 1 else packet_t.input
        for target in (getattr(F, transposed), getattr(torch, transposed), overload):
            table[target] = (dims, True, _CONV_T)
    return table


NORMS: Mapping[Any, tuple[NormKind, tuple[str, ...]]] = _norm_spellings()


CONVS: Mapping[Any, tuple[int, bool, tuple[str, ...]]] = _conv_spellings()


LINEARS: frozenset[Any] = frozenset({F.linear, aten.linear.default})


ACTIVATION_MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu",
    nn.RReLU: "rrelu", nn.ELU: "elu", nn.CELU: "celu", nn.SELU: "selu", nn.GELU: "gelu",
    nn.SiLU: "silu", nn.Mish: "mish", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid", nn.Hardtanh: "hardtanh",
    nn.Softplus: "softplus", nn.Softsign: "softsign", nn.Softmax: "softmax", nn.GLU: "glu",
    nn.LogSigmoid: "logsigmoid", nn.LogSoftmax: "log_softmax",
}  # fmt: skip


MODULES: Mapping[type[nn.Module], str] = {
    **ACTIVATION_MODULES,
    nn.Identity: "identity", nn.Flatten: "flatten", nn.Unflatten: "unflatten",
    nn.PixelShuffle: "pixel_shuffle", nn.PixelUnshuffle: "pixel_unshuffle",
    nn.ChannelShuffle: "channel_shuffle", nn.Upsample: "interpolate", nn.Fold: "fold",
    nn.Unfold: "unfold", nn.Softmax2d: "softmax", nn.Softmin: "softmin",
    nn.Threshold: "threshold", nn.Tanhshrink: "tanhshrink", nn.Hardshrink: "hardshrink",
    nn.Softshrink: "softshrink", nn.Dropout: "dropout", nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout", nn.Dropout3d: "dropout", nn.AlphaDropout: "alpha_dropout",
    nn.FeatureAlphaDropout: "alpha_dropout", nn.UpsamplingNearest2d: "interpolate",
    nn.UpsamplingBilinear2d: "interpolate",
    **{getattr(nn, f"{kind}{axes}d"): f"{name}{axes}d"
       for kind, name in (("MaxPool", "max_pool"), ("AvgPool", "avg_pool"),
                          ("LPPool", "lp_pool"), ("MaxUnpool", "max_unpool"),
                          ("AdaptiveAvgPool", "adaptive_avg_pool"),
                          ("AdaptiveMaxPool", "adaptive_max_pool")) for axes in (1, 2, 3)},
    **{getattr(nn, f"{kind}Pad{axes}d"): "pad"
       for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
       for axes in (1, 2, 3)},
}  # fmt: skip


ACTIVATION_NAMES: frozenset[str] = frozenset(ACTIVATION_MODULES.values())


def function_name(node: Node) -> str | None:
    """Return the plain name of a called function or method: "relu" for `F.relu_`, `x.relu()` …"""
    return plain_name(node.target) if node.op in ("call_method", "call_function") else None


@lru_cache(maxsize=4096)
def plain_name(target: Any) -> str:
    """Return the plain name of a function, or of a method that is given by its name."""
    if isinstance(target, str):
        name = target
    elif isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__
    else:
        name = getattr(target, "__name__", "")
    return name if name.startswith("__") else name.rstrip("_")


def is_getitem(node: Node) -> bool:
    """Return whether `node` indexes a value."""
    return node.op == "call_function" and node.target is operator.getitem


def is_plain(module: nn.Module) -> bool:
    """Return whether `module` computes what its torch.nn base class computes.

    Quantized and fused layers of `torch.ao.nn` inherit from plain ones and compute something else.
    """
    if type(module).__module__.startswith("torch.nn.modules."):
        return is_leaf(module)
    base = next((b for b in type(module).__mro__ if not is_parametrization_class(b)), None)
    while base is not None and not base.__module__.startswith("torch."):
        base = base.__mro__[1]
    return base is not None and base.__module__.startswith("torch.nn.modules.") and is_leaf(module)


def is_parametrization_class(kind: type) -> bool:
    """Return whether `torch.nn.utils.parametrize` made `kind` for one module."""
    return kind.__module__ == "torch.nn.utils.parametrize"
