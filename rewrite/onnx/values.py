"""Values on the way through an ONNX graph, recorded in portions that fit memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from rewrite.equivalence.record import Event, Record, Sketcher
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.runtime import run, session

if TYPE_CHECKING:
    from rewrite.onnx.runtime import Feed


# Values on the way are fetched in portions of about this many bytes.
_PORTION = 512 * 1024 * 1024


def record_graph(opened: OnnxFile, feed: Feed, sketch: Sketcher) -> Record:
    """Run the graph node by node as the file says it, and return a sketch of every value.

    Values are fetched in portions, so that memory stays bounded; optimizations are off.
    """
    graph = opened.model.graph
    names = [name for node in graph.node for name in node.output if name]
    record = Record()
    numbers: dict[str, int] = {}
    for name, value in feed.items():
        numbers[name] = _add(record, sketch, value, None)
    sketches = {}
    for portion in _portions(names, opened):
        for name, value in values_of(opened, feed, portion):
            if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
                sketches[name] = sketch(torch.from_numpy(np.array(value)))
    for node in graph.node:
        given = tuple(numbers[name] for name in node.input if name in numbers)
        made = [name for name in node.output if name in sketches]
        # Sizes are no values of the model: PyTorch keeps them in Python.
        if not given or not made or node.op_type in ("Shape", "Size"):
            continue
        index = len(record.events)
        for name in made:
            numbers[name] = len(record.values)
            record.values.append(sketches[name])
            record.producer.append(index)
        label = node.name or node.output[0]
        outputs = tuple(numbers[name] for name in made)
        record.events.append(Event((label, 0, node.op_type, 0), scope_of(node), given, outputs))
    record.outputs = tuple(numbers[v.name] for v in graph.output if v.name in numbers)
    return record


def _add(record: Record, sketch: Sketcher, value: Any, producer: int | None) -> int:
    record.values.append(sketch(torch.from_numpy(np.array(value))))
    record.producer.append(producer)
    return len(record.values) - 1


def values_of(opened: OnnxFile, feed: Feed, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield values on the way, by making them outputs of the graph."""
    wanted = list(names)
    open_model = onnx.ModelProto()
    open_model.CopyFrom(opened.model)
    del open_model.graph.output[:]
    open_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    live = session(replace(opened, model=open_model), "disabled")
    yield from zip(wanted, run(live, feed, wanted), strict=True)


def _portions(names: list[str], opened: OnnxFile) -> Iterator[list[str]]:
    """Split the values into portions by their declared sizes; undeclared ones count as nothing."""
    sizes = {}
    for value in opened.model.graph.value_info:
        count = 4
        for dim in value.type.tensor_type.shape.dim:
            count *= max(1, dim.dim_value)
        sizes[value.name] = count
    portion: list[str] = []
    total = 0
    for name in names:
        if portion and total + sizes.get(name, 0) > _PORTION:
            yield portion
            portion, total = [], 0
        portion.append(name)
        total += sizes.get(name, 0)
    if portion:
        yield portion


def scope_of(node: Any) -> str | None:
    """Return the qualified name of the module that a node came from, as the exporter notes it."""
    properties: Mapping[str, str] = {item.key: item.value for item in node.metadata_props}
    scopes = properties.get("pkg.torch.onnx.name_scopes")
    if not scopes:
        return None
    names = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""
