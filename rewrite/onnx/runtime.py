"""Run an ONNX graph in onnxruntime, with sessions that can be interrupted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from rewrite.errors import VerificationError, one_line
from rewrite.onnx.file import OnnxFile, open_onnx
from rewrite.onnx.structure import check_sizes
from rewrite.onnx.vetting.constants import has_open_sizes
from rewrite.onnx.vetting.made_up import Feed, check_shape, random_feed, synthetic_feeds
from rewrite.onnx.vetting.worker import EndlessError, Limits, call, deadline

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

LOOP_SECONDS, LOOP_SECONDS_A_MEGABYTE = 1.0, 10.0
"""How long one run of a graph with a Loop may take, which may never end: more for larger ones."""

OPEN_BYTES, OPEN_TIMES = 128 << 20, 128
"""What one run may take of memory whose values have sizes that only the run tells."""


@dataclass(frozen=True)
class Session:
    """A session of onnxruntime, the weights that it reads while it lives, and what a run may take.

    A graph with a `Loop` may never end, and one whose sizes depend on the content of its inputs may
    ask for any memory: both are held to what the file and the inputs hold.
    """

    live: Any
    weights: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    may_loop: bool = False
    has_open_sizes: bool = False

    def seconds(self, feed: Feed) -> float:
        """Return how many seconds a run of these inputs may take."""
        if not self.may_loop:
            return RUN_SECONDS
        megabytes = (self.nbytes + _nbytes(feed)) / 1e6
        return min(RUN_SECONDS, LOOP_SECONDS + LOOP_SECONDS_A_MEGABYTE * megabytes)

    def memory(self, feed: Feed) -> int | None:
        """Return how many bytes a run of these inputs may take, None for half of what is free."""
        if not self.has_open_sizes:
            return None
        return OPEN_BYTES + OPEN_TIMES * (self.nbytes + _nbytes(feed))


def _nbytes(feed: Feed) -> int:
    return sum(value.nbytes for value in feed.values())


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


def session_of_file(source: OnnxFile, threads: int | None = None) -> Session:
    """Return a session of the file itself, as it is deployed, with as many threads as torch has.

    Raises:
        VerificationError: onnxruntime refuses the file, or does not come to an end building it.
    """
    return _built(source, str(source.path), _options("all", threads), {})


def _options(level: str, threads: int | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = _threads() if threads is None else threads
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
        live = call(build, Limits(deadline(source.nbytes)), what, advice)
        loops = "Loop" in source.operator_counts
        return Session(live, weights, source.nbytes, loops, has_open_sizes(source.model))
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

    A graph may hold a loop that never ends: the run is stopped after `seconds` (by itself those
    of the session, for these inputs), and by Ctrl-C.

    Raises:
        VerificationError: the graph refuses the inputs, or does not end.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL_ONLY

    def stop() -> None:
        options.terminate = True

    try:
        found = call(
            lambda: session.live.run(names, feed, options),
            Limits(session.seconds(feed) if seconds is None else seconds, session.memory(feed)),
            f"{graph}:" if isinstance(graph, Path) else str(graph),
            "look for a loop that never ends, or pass a smaller --input",
            stop,
        )
    except EndlessError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {v.dtype}{v.shape}" for name, v in feed.items())
        raise VerificationError(f"{graph} refuses ({shapes}): {_reason(error)}") from error
    return list(found)


def _threads() -> int:
    import torch  # a trial needs none of it

    return int(torch.get_num_threads())


def fitting_feed(source: OnnxFile, live: Session, seed: int) -> Feed:
    """Return made-up inputs that a graph takes, of likely sizes where it declares none.

    Raises:
        VerificationError: there are none, or it does not end, or takes too much memory.
    """
    refused: VerificationError | None = None
    try:
        for feed in synthetic_feeds(source.path, source.inputs, seed):
            try:
                check_sizes(source, feed)
                run(live, feed, graph=source.path)
                return feed
            except EndlessError:
                raise  # other sizes would not end either
            except VerificationError as error:
                refused = refused or error
    except (MemoryError, ValueError) as error:
        raise VerificationError(
            f"{source.path}: no inputs of its declared shapes can be made: {one_line(error)}"
        ) from error
    raise VerificationError(
        f"{refused}; no sizes are known that it takes: pass --input with those that you use"
    ) from refused


def trial(source: OnnxFile, shapes: Sequence[Sequence[int]] | None = None) -> None:
    """Build a graph and run it once: what is refused here costs little, since torch is not needed.

    Args:
        source: the graph.
        shapes: those of its inputs, as many as it has; by themselves made up.

    Raises:
        VerificationError: onnxruntime refuses it, or it takes no such inputs, does not end, or
            takes too much memory.
    """
    if shapes is None:
        fitting_feed(source, session_of_file(source, threads=1), seed=0)
        return
    if len(shapes) != len(source.inputs):
        return  # the verification says of it what there is to say
    for value, shape in zip(source.inputs, shapes, strict=True):
        check_shape(source.path, value, shape)
    feed = random_feed(source.path, source.inputs, shapes)
    check_sizes(source, feed)
    run(session_of_file(source, threads=1), feed, graph=source.path)


def try_file(path: str, shapes: str | None) -> None:
    """Judge a graph and try it once, as `trial` does, with shapes such as `1x3x224x224,1x16`.

    Inputs of another form are not tried, nor are those that are too large for any graph.

    Raises:
        VerificationError: it cannot be read, or is refused.
    """
    source = open_onnx(path)
    if shapes is None:
        trial(source)
    elif re.fullmatch(r"\d+(x\d+)*(,\d+(x\d+)*)*", shapes):
        sizes = [[int(size) for size in part.split("x")] for part in shapes.split(",")]
        if max(map(math.prod, sizes)) < _MOST_ELEMENTS:
            trial(source, sizes)


_MOST_ELEMENTS = 1 << 28
