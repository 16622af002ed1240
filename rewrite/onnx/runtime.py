"""Run an ONNX graph in onnxruntime: sessions, inputs that fit the graph, values on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from rewrite.equivalence.rounding import Perturbation
from rewrite.errors import VerificationError, one_line
from rewrite.onnx.file import Array, OnnxFile, all_nodes
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.leaves import tensors

Feed = dict[str, np.ndarray[Any, Any]]


_Level = onnxruntime.GraphOptimizationLevel


LEVELS = {
    "disabled": _Level.ORT_DISABLE_ALL,
    "basic": _Level.ORT_ENABLE_BASIC,
    "extended": _Level.ORT_ENABLE_EXTENDED,
    "all": _Level.ORT_ENABLE_ALL,
}


# What onnxruntime puts before its reasons: the file once more, lines and functions of its source.
_NOISE = (
    re.compile(r"Load model from .*? failed:\s*"),
    re.compile(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? "),
)


_DEFAULT_SIDE = 64


_DEFAULT_LENGTH = 16


_FATAL_ONLY = 4


_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Session:
    """A session of onnxruntime, and the weights that it reads while it lives."""

    live: Any
    weights: Mapping[str, Any] = field(default_factory=dict)


def session(source: OnnxFile | Path, level: str = "all") -> Session:
    """Return a session on the CPU at an optimization level: of a graph in memory, or of a file.

    Raises:
        VerificationError: onnxruntime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    if level == "disabled":  # runs once or twice: a copy of the weights would not pay
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers = ["CPUExecutionProvider"]
    try:
        if isinstance(source, Path):
            return Session(onnxruntime.InferenceSession(str(source), options, providers=providers))
        weights = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
            for name, value in source.weights.items()
        }
        options.add_external_initializers(list(weights), list(weights.values()))
        graph = source.model.SerializeToString()
        live = onnxruntime.InferenceSession(graph, options, providers=providers)
        return Session(live, weights)
    except Exception as error:
        name = source if isinstance(source, Path) else source.path
        raise VerificationError(
            f"{name}: onnxruntime {onnxruntime.__version__} refuses it: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return what onnxruntime says, without its codes and source paths."""
    text = one_line(error)
    parts = text.replace("[ONNXRuntimeError] : ", "").split(" : ")
    if len(parts) > 2 and parts[0].strip().isdigit():
        text = " : ".join(parts[2:])
    for noise in _NOISE:
        text = noise.sub("", text)
    unknown = "No Op registered" in text or "not a registered function/op" in text
    return text + ("; replace it by operators of the opset" if unknown else "")


def run(
    session: Session,
    feed: Feed,
    names: Sequence[str] | None = None,
    graph: str | Path = "the graph",
) -> list[Any]:
    """Run a session; `graph` is what an error calls it.

    Raises:
        VerificationError: the graph refuses the inputs.
    """
    try:
        return list(session.live.run(names, feed))
    except Exception as error:
        shapes = ", ".join(f"{name} {value.dtype}{value.shape}" for name, value in feed.items())
        raise VerificationError(f"{graph} refuses ({shapes}): {_reason(error)}") from error


def feed_of(opened: OnnxFile, inputs: Inputs) -> Feed:
    """Return inputs by the graph's names: those given by name, the others in order.

    Raises:
        VerificationError: names, number, types or fixed sizes do not match.
    """
    values = opened.inputs
    names = [value.name for value in values]
    named = {key: value for key, value in inputs.kwargs.items() if value is not None}
    positional = tensors(list(inputs.args))
    unknown = [name for name in named if name not in names]
    free = [name for name in names if name not in named]
    if unknown or len(positional) != len(free):
        given = [f"{name!r}" for name in named] + [f"{len(positional)} by position"]
        raise VerificationError(
            f"{opened.path}: the graph's inputs are {', '.join(names)}; given: {', '.join(given)}"
        )
    feed: Feed = {}
    for value in values:
        tensor = named[value.name] if value.name in named else positional[free.index(value.name)]
        feed[value.name] = _fitting(opened.path, value, as_array(tensor))
    return feed


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return a tensor as a numpy array; bfloat16, which numpy lacks, as float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        plain: np.ndarray[Any, Any] = (
            value.float() if value.dtype == torch.bfloat16 else value
        ).numpy()
        return plain
    return np.asarray(value)


def _fitting(path: Path, value: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    kind = value.type.tensor_type
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if array.dtype != wanted:
        if array.dtype.kind == "f" and np.dtype(wanted).kind == "f":
            array = array.astype(wanted)
        else:
            raise VerificationError(
                f"{path}: input {value.name} takes {np.dtype(wanted)}, not {array.dtype}; "
                f"write --input {'x'.join(map(str, array.shape))}:{np.dtype(wanted)}"
            )
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    fits = len(sizes) == array.ndim and all(
        size is None or size == given for size, given in zip(sizes, array.shape, strict=True)
    )
    if kind.HasField("shape") and not fits:
        shape = "x".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
        given = "x".join(map(str, array.shape))
        raise VerificationError(f"{path}: input {value.name} is {shape}, not {given}")
    return array


def accepts(opened: OnnxFile, inputs: Inputs) -> bool:
    """Return whether the graph's own declaration takes inputs of these shapes."""
    try:
        feed_of(opened, inputs)
    except VerificationError:
        return False
    return True


def dynamic_axes(opened: OnnxFile) -> dict[str, dict[int, str]]:
    """Return the axes that each input declares as dynamic, with their names."""
    return {
        value.name: {
            axis: dim.dim_param or "?"
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            if not dim.HasField("dim_value")
        }
        for value in opened.inputs
    }


def synthetic_feed(opened: OnnxFile, batch: int = 1, seed: int = 0) -> Feed:
    """Return random inputs for a graph: what it declares, and likely sizes where it leaves them."""
    random = np.random.default_rng(seed)
    feed: Feed = {}
    for value in opened.inputs:
        kind = value.type.tensor_type
        dims = kind.shape.dim
        free = _DEFAULT_SIDE if len(dims) >= 4 else _DEFAULT_LENGTH
        shape = [
            dim.dim_value if dim.HasField("dim_value") else batch if axis == 0 else free
            for axis, dim in enumerate(dims)
        ]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if dtype.kind == "f":
            feed[value.name] = random.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b":
            feed[value.name] = random.integers(0, 2, shape).astype(dtype)
        else:
            feed[value.name] = random.integers(0, 2, shape).astype(dtype)
    return feed


def with_perturbed_weights(opened: OnnxFile, seed: int = 0) -> OnnxFile:
    """Return a copy whose float32 initializers are half an eps off, at random.

    Those that say how large a value is are left: 15 rows instead of 16 are no rounding.
    """
    nudge = Perturbation(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(opened.model)
    weights = {}
    sizes = {name for node in all_nodes(copy.graph) for name in _size_inputs(node)}

    def moved(value: Array) -> Array:
        return nudge(torch.from_numpy(value), _EPS).numpy()

    for tensor in copy.graph.initializer:
        if tensor.name in opened.weights:
            value = opened.weights[tensor.name]
            weights[tensor.name] = moved(value) if value.dtype == np.float32 else value
        elif tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in sizes:
            value = np.array(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(moved(value), tensor.name))
    return replace(opened, model=copy, weights=weights)


def _size_inputs(node: Any) -> list[str]:
    """Return the inputs of a node that are floats and decide on a shape."""
    if node.op_type == "Range":
        return list(node.input)
    return list(node.input[1:]) if node.op_type in ("Resize", "Upsample") else []
