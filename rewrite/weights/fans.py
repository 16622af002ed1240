"""Where a weight keeps its output units, and how many inputs and outputs it connects.

    y[g, o] = sum over i, k of  units(w)[g, o, i, k] * x[g, i, k]

Every linear map of PyTorch has this form, with g the group, o the output unit inside the group, i
the input unit inside the group and k the position in the kernel. Only the storage differs:

    Linear                 (out, in)                 g = 1, no k
    Conv1d/2d/3d           (out, in / groups, *k)    outputs on axis 0, group by group
    ConvTranspose1d/2d/3d  (in, out / groups, *k)    inputs on axis 0, group by group
    Embedding              (rows, features)          one unit a row, as in a decoder tied to it
    Conv1D (transformers)  (in, out)                 a Linear, stored transposed
    RNN, LSTM, GRU         (gates * hidden, in)      gates one below the other
    MultiheadAttention     (3 * embed, embed)        query, key and value one below the other

fan_in is the number of inputs that one output reads, fan_out the number of outputs that one input
feeds, both away from the borders and on average over positions (a stride of 2 lets only half of the
positions feed each kernel element; dilation changes which, not how many):

    convolution              fan_in  = in / groups * prod(kernel)
                             fan_out = out / groups * prod(kernel) / prod(stride)
    transposed convolution   fan_in  = in / groups * prod(kernel) / prod(stride)
                             fan_out = out / groups * prod(kernel)
    Linear, Conv1D           in, out
    Bilinear                 in1 * in2, out
    Embedding                1 (one row of the one-hot input is on), features
    each gate                in, hidden        (weight_hh: hidden, hidden)
    each of q, k, v          embed (kdim, vdim), embed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rewrite.errors import OptionError
from rewrite.weights.layout import Layout

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LinearMap:
    """One linear map inside a module: a parameter, or a block of rows of a packed one.

    `fan_in` is the number of inputs that one output reads, `fan_out` the number of outputs that one
    input feeds, both away from the borders and on average over positions.
    """

    parameter: str
    layout: Layout
    fan_in: float
    fan_out: float
    part: str = ""
    rows: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """The parameter's name, with the gate or projection for a packed one."""
        return f"{self.parameter}[{self.part}]" if self.part else self.parameter

    def block(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rows of `weight` that belong to this map."""
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]


def linear_maps(module: nn.Module) -> tuple[LinearMap, ...]:
    """Return the linear maps that `module` itself holds (not its children); empty if unknown."""
    if isinstance(module, _CONV):
        return (_convolution(module),)
    if isinstance(module, _TRANSPOSED):
        return (_transposed(module),)
    if isinstance(module, nn.Linear):
        return (LinearMap("weight", Layout(), module.in_features, module.out_features),)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        # One row of the one-hot input is on, so an output reads one input.
        return (LinearMap("weight", Layout(), 1, module.embedding_dim),)
    if isinstance(module, nn.Bilinear):
        fan_in = module.in1_features * module.in2_features
        return (LinearMap("weight", Layout(), fan_in, module.out_features),)
    if isinstance(module, nn.RNNBase):
        return _recurrent(module)
    if isinstance(module, nn.RNNCellBase):
        return _cell(module)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if type(module).__name__ == "Conv1D" and isinstance(nf := getattr(module, "nf", None), int):
        rows = int(module.weight.shape[0])  # type: ignore[index]  # Conv1D of transformers: a Tensor
        return (LinearMap("weight", Layout(inputs_first=True), rows, nf),)
    return ()


def _convolution(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> LinearMap:
    positions = math.prod(conv.kernel_size)
    return LinearMap(
        "weight",
        Layout(groups=conv.groups),
        conv.in_channels // conv.groups * positions,
        conv.out_channels // conv.groups * positions / math.prod(conv.stride),
    )


def _transposed(
    conv: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
) -> LinearMap:
    positions = math.prod(conv.kernel_size)
    return LinearMap(
        "weight",
        Layout(inputs_first=True, groups=conv.groups),
        conv.in_channels // conv.groups * positions / math.prod(conv.stride),
        conv.out_channels // conv.groups * positions,
    )


_GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}


def gate_names(module: nn.RNNBase | nn.RNNCellBase) -> tuple[str, ...]:
    """Return the gates of a recurrent layer in the order in which its weights stack them."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _GATES["LSTM"]
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _GATES["GRU"]
    return ("",)


def _stacked(
    parameter: str, parts: tuple[str, ...], height: int, fan_in: int
) -> tuple[LinearMap, ...]:
    return tuple(
        LinearMap(
            parameter,
            Layout(),
            fan_in,
            height,
            part,
            (index * height, (index + 1) * height) if len(parts) > 1 else None,
        )
        for index, part in enumerate(parts)
    )


def _recurrent(module: nn.RNNBase) -> tuple[LinearMap, ...]:
    gates = gate_names(module)
    state = module.proj_size or module.hidden_size
    directions = 2 if module.bidirectional else 1
    maps: list[LinearMap] = []
    for layer in range(module.num_layers):
        fan_in = module.input_size if layer == 0 else state * directions
        for suffix in ("", "_reverse")[:directions]:
            name = f"l{layer}{suffix}"
            maps += _stacked(f"weight_ih_{name}", gates, module.hidden_size, fan_in)
            maps += _stacked(f"weight_hh_{name}", gates, module.hidden_size, state)
            if module.proj_size:
                maps += _stacked(f"weight_hr_{name}", ("",), module.proj_size, module.hidden_size)
    return tuple(maps)


def _cell(module: nn.RNNCellBase) -> tuple[LinearMap, ...]:
    gates = gate_names(module)
    return (
        *_stacked("weight_ih", gates, module.hidden_size, module.input_size),
        *_stacked("weight_hh", gates, module.hidden_size, module.hidden_size),
    )


def _attention(module: nn.MultiheadAttention) -> tuple[LinearMap, ...]:
    embed = module.embed_dim
    if module._qkv_same_embed_dim:
        return _stacked("in_proj_weight", ("q", "k", "v"), embed, embed)
    return (
        *_stacked("q_proj_weight", ("",), embed, embed),
        *_stacked("k_proj_weight", ("",), embed, int(module.kdim or embed)),
        *_stacked("v_proj_weight", ("",), embed, int(module.vdim or embed)),
    )


def is_quantized_layer(module: nn.Module) -> bool:
    """Return whether `module` is a layer of torch.ao, whose packed weight is no parameter."""
    return type(module).__module__.startswith("torch.ao.nn.") and callable(
        getattr(module, "weight", None)
    )


LAYER_KINDS = (
    "linear",
    "conv",
    "conv_transpose",
    "embedding",
    "recurrent",
    "attention",
    "bilinear",
)


def listed_kinds(text: str, known: Sequence[str], who: str) -> tuple[str, ...]:
    """Return the kinds of layer that a text lists, with commas between them.

    Args:
        text: it; empty for none.
        known: the kinds that there are, of `LAYER_KINDS`.
        who: the pass whose option it is, for the message.

    Raises:
        OptionError: a kind is none of these.
    """
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    for kind in kinds:
        if kind not in known:
            raise OptionError(f"{who}: unknown layer kind {kind!r}; known are {', '.join(known)}")
    return kinds


def layer_kind(module: nn.Module) -> str:
    """Return which of `LAYER_KINDS` a layer with linear maps is."""
    if isinstance(module, _CONV):
        return "conv"
    if isinstance(module, _TRANSPOSED):
        return "conv_transpose"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        return "attention"
    return "bilinear" if isinstance(module, nn.Bilinear) else "linear"
