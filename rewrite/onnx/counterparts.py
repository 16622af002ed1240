"""Match nodes of an ONNX graph with values of a reference, and find the first that differs.

    divergent     inputs agree, the output and all that is made of it does not      (divergence)
    counterpart   the reference's call of the same operator on the same values, of the same shape

A graph splits operators (a norm into its mean, its variance and its affine part) and joins them (a
norm into the convolution before it), so the nearest value of the reference need not be what a node
should have made. Where the outputs agree, only a node with a counterpart can be called wrong for a
value on the way, such as one that a clamp hides on these inputs; any other is worth a note.

Indices are told apart by what they point at: of equal values either is right, and PyTorch,
onnxruntime and every version of both break such ties in their own order.

    TopK(x), ArgMax(x):   x[i] = x[j], i != j      either index
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from rewrite.equivalence.divergence import Divergence, first_divergent, masked
from rewrite.equivalence.record import Event, Known, Near, Record
from rewrite.onnx.file import Array, OnnxFile
from rewrite.onnx.values import values_of
from rewrite.onnx.vetting.made_up import Feed

_OPERATORS: dict[str, frozenset[str]] = {
    kind: frozenset(names.split())
    for kind, names in {
        "Conv": "conv1d conv2d conv3d conv conv_forward convolution linear unfold",
        "ConvTranspose": "conv_transpose1d conv_transpose2d conv_transpose3d convolution",
        "Gemm": "linear addmm matmul mm baddbmm",
        "MatMul": "linear matmul mm bmm addmm baddbmm einsum rmatmul",
        "Add": "add radd iadd", "Sub": "sub rsub isub subtract", "Mul": "mul rmul imul multiply",
        "Div": "div rdiv idiv truediv rtruediv itruediv divide true_divide",
        "Relu": "relu", "LeakyRelu": "leaky_relu", "Sigmoid": "sigmoid", "Tanh": "tanh",
        "Gelu": "gelu", "Elu": "elu", "Selu": "selu", "Softplus": "softplus", "PRelu": "prelu",
        "HardSwish": "hardswish", "HardSigmoid": "hardsigmoid", "Mish": "mish", "Erf": "erf",
        "Clip": "clamp clip hardtanh relu6 clamp_min clamp_max", "Softmax": "softmax",
        "LogSoftmax": "log_softmax", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Pow": "pow",
        "BatchNormalization": "batch_norm", "InstanceNormalization": "instance_norm",
        "GroupNormalization": "group_norm", "LayerNormalization": "layer_norm",
        "RMSNormalization": "rms_norm", "LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh rnn_relu",
        "MaxPool": "max_pool1d max_pool2d max_pool3d", "AveragePool": "avg_pool1d avg_pool2d",
        "GlobalAveragePool": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean",
        "ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "amax max", "ReduceMin": "amin min",
        "Concat": "cat concat concatenate stack", "Resize": "interpolate upsample",
        "Where": "where masked_fill", "Pad": "pad", "Gather": "embedding index_select getitem",
        "Einsum": "einsum", "CumSum": "cumsum", "TopK": "topk sort",
        "Transpose": "permute transpose t",
    }.items()
}  # fmt: skip
"""What PyTorch calls an operator of ONNX."""


_JOINED = frozenset({"batch_norm", "mul", "add", "sub", "div", "truediv", "rmul", "radd"})
"""What an exporter joins into the linear operator before it."""


@dataclass(frozen=True)
class Parting:
    """The first node that parts from a reference.

    Attributes:
        divergence: where, and by how much.
        call: the reference's call whose value is missing in the graph.
        proved: whether the node has a counterpart, so that its value is wrong whatever the outputs.
    """

    divergence: Divergence
    call: Event | None
    proved: bool


def find_parting(
    graph: Record, reference: Record, noise: Sequence[float], own: Sequence[float]
) -> Parting | None:
    """Return the first node of `graph` that leaves the values of `reference`, None without one.

    `noise` is how far each value of the reference may be off, `own` how far each of the graph.
    """
    known = Known(reference.values, noise)
    found = [known.nearest(value) for value in graph.values]
    found = [
        near._replace(noise=max(near.noise, mine)) for near, mine in zip(found, own, strict=True)
    ]
    seen = Known(graph.values)
    theirs = [
        seen.nearest(value)._replace(noise=mine)
        for value, mine in zip(reference.values, noise, strict=True)
    ]
    event = first_divergent(graph, found, masked(graph, found, reference, theirs))
    if event is None:
        return None
    there = first_divergent(reference, theirs, masked(reference, theirs, graph, found))
    far = max((found[number].distance for number in event.outputs), default=math.inf)
    near = max((found[number].distance for number in event.inputs), default=0.0)
    node = event.owner
    # The module of a node: as the exporter noted it, else as the values tell.
    target = event.source or (there.owner if there is not None and event.source is None else "")
    divergence = Divergence(
        target=target,
        function=event.function,
        source=there.source if there is not None else None,
        source_after=None,
        error_in=near,
        error_out=far,
        node=node,
        note=f"node {node} ({event.function}) of {target or 'the graph'} is off by {far:.1e}",
    )
    return Parting(divergence, there, _has_counterpart(event, graph, reference, found))


def _has_counterpart(event: Event, graph: Record, reference: Record, found: Sequence[Near]) -> bool:
    """Return whether what a node made is nearest to what its own operator makes of its inputs."""
    same = Known(reference.values)

    def first(number: int) -> int | None:
        # A view, a dropout in eval mode: one value under several numbers.
        return same.nearest(reference.values[number]).number

    given = {found[number].number for number in event.inputs}
    for made in event.outputs:
        target = found[made].number
        if target is None or graph.values[made].shape != reference.values[target].shape:
            continue
        call = _producer(reference, target)
        if call is None:
            continue
        inputs = {first(number) for number in call.inputs}
        if alike(event.function, call.function) and inputs == given:
            return True
        before = _producer(reference, call.inputs[0]) if call.inputs else None
        if (
            before is not None
            and _plain(call.function) in _JOINED
            and alike(event.function, before.function)
            and {first(number) for number in before.inputs} == given
        ):
            return True
    return False


def _producer(reference: Record, number: int) -> Event | None:
    index = reference.producer[number]
    return None if index is None else reference.events[index]


def alike(operator: str, function: str) -> bool:
    """Return whether an operator of ONNX is what PyTorch, or another graph, calls `function`."""
    return operator == function or _plain(function) in _OPERATORS.get(operator, ())


def _plain(function: str) -> str:
    """Return the name of a function without what marks it as private, special or in place."""
    return function.strip("_").lower()


# -- ties -----------------------------------------------------------------------------------------


_CHOOSING = {"TopK": -1, "ArgMax": 0, "ArgMin": 0}
"""Operators that answer with indices, and their default axis."""


_PASSING = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""What hands indices on in their order."""


def tied_outputs(
    opened: OnnxFile, feed: Feed, got: list[Any], expected: list[Any], noise: float
) -> dict[int, int]:
    """Return the outputs that hold other indices of equal values, and how many of them differ.

    `noise` is how far values may be apart, relative to the largest, to count as equal.
    """
    found = {}
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        a, b = np.asarray(mine), np.asarray(theirs)
        if a.dtype.kind not in "iu" or a.shape != b.shape or np.array_equal(a, b):
            continue
        node = _choosing(opened, opened.model.graph.output[index].name)
        if node is None:
            continue
        source = node.input[0]
        given: Mapping[str, Array] = feed
        values = (
            given[source] if source in given else dict(values_of(opened, feed, [source]))[source]
        )
        if _tied(node, np.asarray(values), a, b, noise):
            found[index] = int((a != b).sum())
    return found


def _choosing(opened: OnnxFile, name: str) -> Any:
    """Return the node that chose the indices which an output hands on, None without one."""
    producers = {out: node for node in opened.model.graph.node for out in node.output}
    node = producers.get(name)
    while node is not None and node.op_type in _PASSING:
        name = node.input[0]
        node = producers.get(name)
    if node is None or node.op_type not in _CHOOSING:
        return None
    return node if node.op_type != "TopK" or name == node.output[1] else None


def _tied(node: Any, values: Array, a: Array, b: Array, noise: float) -> bool:
    attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    axis = attributes.get("axis", _CHOOSING[node.op_type])
    if values.ndim == 0 or values.dtype.kind not in "fiu":
        return False
    size = values.shape[axis]
    # Without kept dimensions the axis is gone from the indices; both are read in its place.
    rows = np.moveaxis(values, axis, -1)
    if a.size % max(1, rows[..., 0].size):
        return False
    if node.op_type == "TopK" and a.ndim == values.ndim:
        a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    a, b = (x.astype(np.int64).reshape(*rows.shape[:-1], -1) for x in (a, b))
    if min(a.min(), b.min()) < 0 or max(a.max(), b.max()) >= size:
        return False
    chosen, other = (np.take_along_axis(rows, x, -1).astype(np.float64) for x in (a, b))
    allowed = noise * float(np.abs(values.astype(np.float64)).max())
    return bool(np.all(np.abs(chosen - other) <= allowed))
