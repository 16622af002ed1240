"""Check an ONNX graph before it runs: the ONNX checker, and structural problems it misses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import numpy_helper

from rewrite.errors import one_line
from rewrite.onnx.file import LARGE, Array, OnnxFile, initializer
from rewrite.onnx.vetting.nodes import all_nodes, label
from rewrite.onnx.vetting.sizes import check_values
from rewrite.onnx.vetting.work import check_run, infer
from rewrite.onnx.vetting.worker import Limits, call, deadline

T = TypeVar("T")


def structure_problems(opened: OnnxFile) -> list[str]:
    """Return what the checker and a look at the graph find wrong."""
    problems = [*_checker(opened)]
    for node in all_nodes(opened.model.graph):
        name = label(node)
        problems += [
            f"{name}: {node.op_type} is in training mode"
            for attribute in node.attribute
            if attribute.name == "training_mode" and attribute.i
        ]
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            flag = _constant(opened, node.input[2])
            if flag is None or bool(flag.any()):
                problems.append(f"{name}: Dropout is in training mode")
    problems += [
        f"initializers {first} and {second} hold the same {size} bytes"
        for first, second, size in duplicates(opened)
    ]
    return problems


def _checker(opened: OnnxFile) -> Iterator[str]:
    try:
        model = _weights_given(opened)
        _native(opened, lambda: onnx.checker.check_model(model, full_check=True))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield f"onnx.checker: {one_line(error)}"
    except UnicodeDecodeError:
        yield "onnx.checker: a name or a message about it is no UTF-8 text"


def _weights_given(opened: OnnxFile) -> onnx.ModelProto:
    """Return the graph with the weights beside it as inputs: types and shapes are checked alike."""
    model = onnx.ModelProto()
    model.CopyFrom(opened.model)
    graph = model.graph
    inputs = {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in opened.weights]
    for tensor in graph.initializer:
        if tensor.name in opened.weights and tensor.name not in inputs:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model


def check_sizes(opened: OnnxFile, feed: Mapping[str, Array]) -> None:
    """Raise VerificationError where a run would take too much, of memory or of arithmetic.

    Known before anything is run, as far as shape inference knows it from the sizes of the inputs.
    """
    model = _weights_given(opened)
    for value in model.graph.input:
        if value.name in feed:
            shape = value.type.tensor_type.shape
            del shape.dim[:]
            shape.dim.extend(
                onnx.TensorShapeProto.Dimension(dim_value=size) for size in feed[value.name].shape
            )
    # Without the contents of shapes first, which grow with the values that they would be taken of.
    for data in ("unknown", "propagated"):
        inferred = _native(opened, partial(infer, model, data=data))
        if inferred is None:
            return  # the checker tells of it
        check_values(opened.path, inferred.graph)
        given = sum(value.nbytes for value in feed.values())
        check_run(opened.path, inferred.graph, opened.nbytes + given)


def _native(opened: OnnxFile, function: Callable[[], T]) -> T:
    what = f"{opened.path}: checking it"
    return call(function, Limits(deadline(opened.nbytes)), what, "export it again, or simplify it")


def _constant(opened: OnnxFile, name: str) -> Array | None:
    for tensor in opened.model.graph.initializer:
        if tensor.name == name:
            return initializer(opened, tensor)
    for node in all_nodes(opened.model.graph):
        if node.op_type == "Constant" and name in node.output:
            return numpy_helper.to_array(node.attribute[0].t)
    return None


def duplicates(opened: OnnxFile) -> list[tuple[str, str, int]]:
    """Return pairs of large initializers with the same content; constant ones are not worth it."""
    alike: dict[tuple[Any, ...], list[tuple[str, Array]]] = defaultdict(list)
    found = []
    for tensor in opened.model.graph.initializer:
        if tensor.name not in opened.weights and len(tensor.raw_data) < LARGE:
            continue
        value = initializer(opened, tensor)
        flat = value.reshape(-1).view(np.uint8)
        group = alike[tensor.data_type, tuple(tensor.dims), flat[:LARGE].tobytes()]
        first = next((name for name, other in group if np.array_equal(flat, other)), None)
        if first is None:
            group.append((tensor.name, flat))
        elif (value != value.flat[0]).any():
            found.append((first, tensor.name, flat.size))
    return found
