"""Run one of PyTorch's exporters: what may vary, names, and its failures in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rewrite.errors import ExportError, one_line
from rewrite.onnx.torchscript import NEWEST_OPSET, trace_to_onnx
from rewrite.runtime.inputs import Inputs, call
from rewrite.runtime.leaves import leaves, tensors
from rewrite.runtime.modes import isolated

Exporter = Literal["dynamo", "torchscript"]


_BATCH = "batch"


@dataclass(frozen=True)
class ExportRequest:
    """What an export should be like."""

    opset: int
    axes: Mapping[str, Mapping[int, str]]
    batch: bool
    seed: int


def export_program(
    model: nn.Module, inputs: Inputs, asked: ExportRequest, exporter: Exporter, notes: list[str]
) -> Any:
    """Return a graph with `.model` (of onnx_ir) and `.save`; `notes` takes up what to know of it.

    Raises:
        ExportError: the model does not run on the inputs, or the exporter fails.
    """
    output_names = _output_names(model, inputs, asked.seed)
    shapes = _dynamic_shapes(model, inputs, asked)
    if exporter == "torchscript":
        notes.append("traced by the exporter torchscript: branches are those of the given input")
        return _traced(model, inputs, asked, output_names, shapes or {})
    arguments = {
        "opset_version": asked.opset,
        "output_names": output_names,
        "dynamo": True,
        "verbose": False,
    }
    if shapes is None:
        return _exported(model, inputs, arguments)
    by_name = inputs.kwargs or len(shapes) != len(inputs.args)
    given = shapes if by_name else tuple(shapes.values())
    try:
        wider = _wider(inputs) if asked.batch else inputs
        return _exported(model, wider, {**arguments, "dynamic_shapes": given})
    except ExportError as error:
        if asked.axes or not asked.batch:
            raise
        program = _exported(model, inputs, arguments)
        notes.append(
            f"the batch is fixed: with a dynamic one the exporter fails: {one_line(error)}"
        )
        return program


def _exported(model: nn.Module, inputs: Inputs, arguments: dict[str, Any]) -> Any:
    with _quiet(), _failing(model, "; --exporter torchscript may trace it"):
        program = torch.onnx.export(model, inputs.args, kwargs=dict(inputs.kwargs), **arguments)
    asked = arguments["opset_version"]
    written = program.model.opset_imports[""] if program is not None else asked
    if written != asked:
        raise ExportError(f"--opset {asked}: the exporter writes opset {written} instead")
    return program


def _traced(
    model: nn.Module,
    inputs: Inputs,
    asked: ExportRequest,
    output_names: list[str],
    shapes: Mapping[str, Any],
) -> Any:
    """Run the older exporter; what varies is an axis of an input that is one tensor."""
    if asked.opset > NEWEST_OPSET:
        raise ExportError(f"--opset {asked.opset}: the exporter torchscript ends at {NEWEST_OPSET}")
    axes = {name: shape for name, shape in shapes.items() if isinstance(shape, dict)}
    names = _input_names(model, inputs)
    with _quiet(), _failing(model, ""):
        return trace_to_onnx(model, inputs, names, output_names, axes, asked.opset)


@contextlib.contextmanager
def _failing(model: nn.Module, fix: str) -> Iterator[None]:
    """Turn whatever the exporter raises into one line, and what may help."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f"{type(model).__name__}: torch.onnx.export fails: {one_line(cause)}{fix}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines to itself: what matters is verified afterwards."""
    # The tracer's loggers are many and set their own levels: all are off meanwhile. It prints too.
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(before)


def _dynamic_shapes(
    model: nn.Module, inputs: Inputs, asked: ExportRequest
) -> dict[str, Any] | None:
    """Return what may vary of each input, None where nothing does."""
    axes = asked.axes
    names = _input_names(model, inputs)
    unknown = [name for name in axes if name not in names]
    if unknown:
        raise ExportError(
            f"--dynamic-shape {unknown[0]}: no such input; the inputs are {', '.join(names)}"
        )
    for name, value in zip(names, (*inputs.args, *inputs.kwargs.values()), strict=True):
        for axis in axes.get(name, ()):
            if isinstance(value, torch.Tensor) and axis >= value.ndim:
                raise ExportError(
                    f"--dynamic-shape {name}:{axis}: {name} has {value.ndim} axes, counted from 0"
                )
    firsts = {t.shape[0] for t in tensors([inputs.args, dict(inputs.kwargs)]) if t.ndim}
    shared = asked.batch and len(firsts) == 1
    if not shared and not axes:
        return None

    def of(leaf: Any, wanted: Mapping[int, str]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        spec: dict[int, Any] = {0: _BATCH} if shared and leaf.ndim else {}
        return spec | dict(wanted) or None

    shapes: dict[str, Any] = {}
    for name, value in zip(names, (*inputs.args, *inputs.kwargs.values()), strict=True):
        shapes[name] = torch.utils._pytree.tree_map(
            lambda leaf, n=name: of(leaf, axes.get(n, {})), value
        )
    return shapes


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    signature = inspect.signature(model.forward)
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(inputs.args) - len(names))]
        elif len(names) < len(inputs.args) and parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names + list(inputs.kwargs)


def _wider(inputs: Inputs) -> Inputs:
    """Return inputs with a batch of at least two: the exporter takes a 1 for a constant."""

    def doubled(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == 1:
            return torch.cat([leaf, leaf])
        return leaf

    return inputs.map(doubled)


def _output_names(model: nn.Module, inputs: Inputs, seed: int) -> list[str]:
    """Return a name for each output: keys and fields, else output, output_1 …"""
    try:
        with isolated(model):
            output = call(model, inputs, seed)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__}: does not run on ({inputs}): {one_line(error)}; "
            "pass another --input"
        ) from error
    names = []
    for path, leaf in leaves(output, ""):
        if isinstance(leaf, torch.Tensor):
            cleaned = "_".join(
                part for part in path.replace("[", ".").replace("]", "").split(".") if part
            ).replace("'", "")
            names.append(f"output_{cleaned}" if cleaned.isdigit() else cleaned or "output")
    return names
