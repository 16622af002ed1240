"""Call PyTorch's exporters: dynamic axes, input and output names, and one-line errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves_with_path, tree_map

from rewrite.errors import ExportError, one_line
from rewrite.onnx.torchscript import NEWEST_OPSET, trace_to_onnx
from rewrite.runtime.attention import AttentionWrittenOut
from rewrite.runtime.batch_axes import BATCH, find_batch_axes, widened
from rewrite.runtime.inputs import Inputs, call
from rewrite.runtime.leaves import carries_objects, leaves, tensors
from rewrite.runtime.modes import isolated
from rewrite.runtime.quiet import quiet

Exporter = Literal["dynamo", "torchscript"]


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
    """Return a graph with `.model` (of onnx_ir) and `.save`; `notes` absorbs what to know of it.

    Raises:
        ExportError: the model does not run on the inputs, or the exporter fails.
    """
    output = _output(model, inputs, asked.seed)
    output_names = _output_names(output)
    model = _with_plain_outputs(model, output)
    shapes = _dynamic_shapes(model, inputs, asked, notes)
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
        return _exported(model, inputs, arguments, notes)
    try:
        wider = widened(inputs, shapes)
        return _exported(model, wider, {**arguments, "dynamic_shapes": shapes}, notes)
    except ExportError as error:
        if asked.axes or not asked.batch:
            raise
        program = _exported(model, inputs, arguments, notes)
        notes.append(
            f"the batch is fixed: with a dynamic one the exporter fails: {one_line(error)}"
        )
        return program


def _exported(model: nn.Module, inputs: Inputs, arguments: dict[str, Any], notes: list[str]) -> Any:
    """Run the exporter; where it refuses attention in fused form, write attention out."""
    with quiet():
        try:
            program = _run_exporter(model, inputs, arguments)
        except Exception as error:
            with _failing(model, "; --exporter torchscript may trace it"):
                written = AttentionWrittenOut()
                try:
                    with written:
                        program = _run_exporter(model, inputs, arguments)
                except Exception:  # noqa: BLE001 - of two failures the first is the cause
                    raise error from error.__cause__
                if not written.calls:
                    raise
            notes.append(
                "attention is written out as matmul, softmax, matmul: the exporter refuses its "
                f"fused form ({one_line(_cause(error))})"
            )
    asked = arguments["opset_version"]
    made = program.model.opset_imports[""] if program is not None else asked
    if made != asked:
        raise ExportError(f"--opset {asked}: the exporter writes opset {made} instead")
    return program


def _run_exporter(model: nn.Module, inputs: Inputs, arguments: dict[str, Any]) -> Any:
    args, kwargs = inputs.args, dict(inputs.kwargs)
    if args and not kwargs and isinstance(args[-1], dict):
        # A last positional dict is taken for keywords: it gets its name instead.
        bound = inspect.signature(model.forward).bind(*args)
        named = list(bound.arguments)[: len(args)]
        if len(named) == len(args) and not _variadic(model):
            args, kwargs = args[:-1], {named[-1]: args[-1]}
    return torch.onnx.export(model, args, kwargs=kwargs, **arguments)


def _variadic(model: nn.Module) -> bool:
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds


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
    with quiet(), _failing(model, ""):
        return trace_to_onnx(model, inputs, names, output_names, axes, asked.opset)


@contextlib.contextmanager
def _failing(model: nn.Module, fix: str) -> Iterator[None]:
    """Turn whatever the exporter raises into one line, and what may help."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__}: torch.onnx.export fails: {one_line(_cause(error))}{fix}"
        ) from error


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _dynamic_shapes(
    model: nn.Module, inputs: Inputs, asked: ExportRequest, notes: list[str]
) -> dict[str, Any] | None:
    """Return what may vary of each argument by its name, None where nothing does."""
    arguments = _arguments(model, inputs)
    names = {name for name, _ in _flat(arguments)}
    unknown = [name for name in asked.axes if name not in names and name not in arguments]
    if unknown:
        raise ExportError(
            f"--dynamic-shape {unknown[0]}: no such input; the inputs are {', '.join(arguments)}"
        )
    flat = _flat(arguments)
    specs: list[dict[int, Any]] = []
    for name, leaf in flat:
        root = next((n for n in arguments if name == n or name.startswith(f"{n}_")), name)
        axes = dict(asked.axes.get(name, asked.axes.get(root, {})))
        for axis in axes:
            if isinstance(leaf, torch.Tensor) and axis >= leaf.ndim:
                raise ExportError(
                    f"--dynamic-shape {name}:{axis}: {name} has {leaf.ndim} axes, counted from 0"
                )
        specs.append(axes)
    named = any(label == BATCH for axes in specs for label in axes.values())
    if asked.batch and not named:
        given = [leaf for _, leaf in flat]
        taken = [frozenset(axes) for axes in specs]
        axes_of_batch = find_batch_axes(model, inputs, given, taken, asked.seed)
        if axes_of_batch is None:
            notes.append(
                "the batch is fixed: no axis of the inputs is known that they share and that the "
                "model takes at another size; name it with --dynamic-shape INPUT:AXIS=batch"
            )
        else:
            for spec, place in zip(specs, axes_of_batch, strict=True):
                if place is not None:
                    spec[place] = BATCH
    if not any(specs):
        return None
    rest = iter([spec or None for spec in specs])
    return {
        name: tree_map(lambda leaf: next(rest) if isinstance(leaf, torch.Tensor) else None, value)
        for name, value in arguments.items()
    }


def _arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return what the forward is called with, by the names of its parameters."""
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExportError(
            f"{type(model).__name__}: its forward does not take ({inputs}): {one_line(error)}; "
            "pass another --input"
        ) from error
    return dict(bound.arguments)


def _flat(arguments: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of arguments, each under the name that the exporter gives it."""
    found = []
    for name, value in arguments.items():
        for path, leaf in tree_leaves_with_path(value):
            if isinstance(leaf, torch.Tensor):
                inner = [
                    str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path
                ]
                found.append(("_".join([name, *inner]), leaf))
    return found


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    return [name for name, _ in _flat(_arguments(model, inputs))]


def _output(model: nn.Module, inputs: Inputs, seed: int) -> Any:
    try:
        with isolated(model):
            return call(model, inputs, seed)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__}: does not run on ({inputs}): {one_line(error)}; "
            "pass another --input"
        ) from error


def _output_names(output: Any) -> list[str]:
    """Return a name for each output: keys and fields, else output, output_1 …"""
    names = []
    for path, leaf in leaves(output, ""):
        if isinstance(leaf, torch.Tensor):
            cleaned = "_".join(
                part for part in path.replace("[", ".").replace("]", "").split(".") if part
            ).replace("'", "")
            names.append(f"output_{cleaned}" if cleaned.isdigit() else cleaned or "output")
    return names


def _with_plain_outputs(model: nn.Module, output: Any) -> nn.Module:
    """Return a model that returns tensors alone where it returns objects that carry them, a cache.

    It shares everything with `model` but its forward; `model` itself where there is no such object.
    """
    if not carries_objects(output):
        return model
    plain = copy.copy(model)
    forward = type(model).forward.__get__(plain)

    @functools.wraps(forward)
    def tensors_alone(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensors(forward(*args, **kwargs)))

    plain.forward = tensors_alone
    return plain
