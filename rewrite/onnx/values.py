"""Record intermediate values of an ONNX graph in batches that fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from rewrite.equivalence.record import Event, Record, Sketcher
from rewrite.onnx.feeds import as_tensor
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.noise import long_sums
from rewrite.onnx.runtime import run, session
from rewrite.onnx.vetting.nodes import all_nodes

if TYPE_CHECKING:
    from rewrite.onnx.vetting.made_up import Feed


# Values on the way are fetched in portions of about this many bytes.
_PORTION = 512 * 1024 * 1024


def record_graph(opened: OnnxFile, feed: Feed, sketch: Sketcher, *, bounds: bool = False) -> Record:
    """Run the graph node by node as the file says it, and return a sketch of every value.

    Values are fetched in portions, so that memory stays bounded; optimizations are off. What does
    not depend on an input is no value. With `bounds` the record says how far long sums may be off.
    """
    nodes, names = _computed(opened, feed)
    record = Record()
    numbers: dict[str, int] = {}
    for name, value in feed.items():
        numbers[name] = _add(record, sketch, value, None)
    sketches = {}
    sums, limits = long_sums(opened) if bounds else {}, dict[str, float]()
    fed = ((name, value) for name, value in feed.items() if name in sums)
    portions = _portions(names, opened)
    fetched = (pair for portion in portions for pair in values_of(opened, feed, portion))
    for name, value in itertools.chain(fed, fetched):
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            if name not in feed:
                sketches[name] = sketch(as_tensor(value))
            limits.update((output, bound(value)) for output, bound in sums.get(name, ()))
    for node in nodes:
        given = tuple(numbers[name] for name in _reads(node) if name in numbers)
        produced = [name for name in node.output if name in sketches]
        if not given or not produced:
            continue
        index = len(record.events)
        for name in produced:
            numbers[name] = len(record.values)
            if limits.get(name):
                record.bounds[numbers[name]] = limits[name]
            record.values.append(sketches[name])
            record.producer.append(index)
        label = node.name or node.output[0]
        outputs = tuple(numbers[name] for name in produced)
        record.events.append(Event((label, 0, node.op_type, 0), scope_of(node), given, outputs))
    ends = (value.name for value in opened.model.graph.output)
    record.outputs = tuple(numbers[name] for name in ends if name in numbers)
    return record


def _computed(opened: OnnxFile, feed: Feed) -> tuple[list[Any], list[str]]:
    """Return the nodes that compute something of the inputs, and the names of what they make.

    Sizes are no values of the model: PyTorch keeps them in Python.
    """
    depends = set(feed)
    nodes, names = [], []
    for node in opened.model.graph.node:
        if node.op_type in ("Shape", "Size") or depends.isdisjoint(_reads(node)):
            continue
        nodes.append(node)
        made = [name for name in node.output if name]
        names += made
        depends.update(made)
    return nodes, names


def _reads(node: Any) -> list[str]:
    """Return the names that a node reads, and those that graphs inside it read."""
    inner = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*node.input, *(n for graph in inner for other in all_nodes(graph) for n in other.input)]


def _add(record: Record, sketch: Sketcher, value: Any, producer: int | None) -> int:
    record.values.append(sketch(as_tensor(value)))
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
    properties: Mapping[str, str] = {prop.key: prop.value for prop in node.metadata_props}
    scopes = properties.get("pkg.torch.onnx.name_scopes")
    if not scopes:
        return None
    names = [part.strip().strip("'\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""
