"""Run an ONNX graph in onnxruntime, with sessions that can be interrupted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from rewrite.errors import VerificationError, one_line
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.vetting.worker import EndlessError, call, deadline

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


_FATAL_ONLY = 4


RUN_SECONDS = 600.0
"""How long one run of a graph may take that is sure to end."""

LOOP_SECONDS, LOOP_SECONDS_A_MEGABYTE = 30.0, 1.0
"""How long one run of a graph with a Loop may take, which may never end: more for larger ones."""


@dataclass(frozen=True)
class Session:
    """A session of onnxruntime, and the weights that it reads while it lives."""

    live: Any
    weights: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = RUN_SECONDS


def budget(source: OnnxFile) -> float:
    """Return how many seconds one run of a graph may take.

    Only a `Loop` may never end; a graph with one gets 30 s, and 1 s more for each MB of it.
    """
    if "Loop" not in source.operator_counts:
        return RUN_SECONDS
    return min(RUN_SECONDS, LOOP_SECONDS + LOOP_SECONDS_A_MEGABYTE * source.nbytes / 1e6)


def session(source: OnnxFile, level: str = "all") -> Session:
    """Return a session on the CPU, at an optimization level, of a graph in memory.

    Raises:
        VerificationError: onnxruntime refuses the graph, or does not come to an end building it.
    """
    options = _options(level)
    weights = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
        for name, value in source.weights.items()
    }
    options.add_external_initializers(list(weights), list(weights.values()))
    return _built(source, source.model.SerializeToString(), options, weights)


def session_of_file(source: OnnxFile) -> Session:
    """Return a session of the file itself, as it is deployed.

    Raises:
        VerificationError: onnxruntime refuses the file, or does not come to an end building it.
    """
    return _built(source, str(source.path), _options("all"), {})


def _options(level: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    if level == "disabled":  # runs once or twice: a copy of the weights would not pay
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _built(
    source: OnnxFile, graph: str | bytes, options: Any, weights: Mapping[str, Any]
) -> Session:
    def build() -> Any:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    what, advice = f"{source.path}: building it", "look for constants that it computes"
    try:
        live = call(build, deadline(source.nbytes), what, advice)
        return Session(live, weights, budget(source))
    except EndlessError:
        raise
    except Exception as error:
        raise VerificationError(
            f"{source.path}: onnxruntime {onnxruntime.__version__} refuses it: {_reason(error)}"
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
    seconds: float | None = None,
) -> list[Any]:
    """Run a session; `graph` is what an error calls it.

    A graph may hold a loop that never ends: the run is stopped after `seconds` (by itself: those
    of the session's graph, see `budget`), and by Ctrl-C.

    Raises:
        VerificationError: the graph refuses the inputs, or does not end.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL_ONLY
    seconds = session.seconds if seconds is None else seconds
    try:
        found = call(
            lambda: session.live.run(names, feed, options),
            seconds,
            f"{graph}:" if isinstance(graph, Path) else str(graph),
            "look for a loop that never ends, or pass a smaller --input",
        )
    except EndlessError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {v.dtype}{v.shape}" for name, v in feed.items())
        raise VerificationError(f"{graph} refuses ({shapes}): {_reason(error)}") from error
    finally:
        options.terminate = True  # of a run that has ended it is nothing
    return list(found)


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return a tensor as a numpy array; bfloat16, which numpy lacks, as float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        plain: np.ndarray[Any, Any] = (
            value.float() if value.dtype == torch.bfloat16 else value
        ).numpy()
        return plain
    return np.asarray(value)


def as_tensor(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return an array of any layout and spelling of its type as a tensor of its own."""
    # numpy has two types of 64 bits, and torch knows one of them.
    plain = np.array(value)
    known = (
        np.dtype(f"{plain.dtype.kind}{plain.dtype.itemsize}") if plain.dtype.kind in "iu" else None
    )
    return torch.from_numpy(plain if known is None else plain.view(known))
