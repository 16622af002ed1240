"""Open an ONNX file that anyone made, and say in one line what is wrong with it.

Nothing in a file is believed: external data has to lie inside the model's folder and have the size
that its tensor needs, before a byte of it is read.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model

from rewrite.errors import VerificationError
from rewrite.inputs import one_line

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "ai.onnx.preview.training")
LARGE = 64 * 1024
# A message ends at 2 GiB; what is left is for names and nodes.
_IN_ONE_MESSAGE = 1.9e9


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model in memory, and where it came from: a file with or without external data."""

    path: Path
    model: onnx.ModelProto
    external: bool = False

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        return max(versions, default=0)

    @property
    def census(self) -> dict[str, int]:
        """How often each operator occurs, subgraphs included."""
        counts = Counter(node.op_type for node in all_nodes(self.model.graph))
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def inputs(self) -> list[Any]:
        """The graph's inputs that are no initializers."""
        given = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in given]


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yield every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)
            for inner in attribute.graphs:
                yield from all_nodes(inner)


def open_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file and its external data.

    Raises:
        VerificationError: it is missing, no ONNX file, or its external data is missing, of another
            size, or outside of its folder; or a weight is NaN.
    """
    place = Path(path)
    if not place.is_file():
        raise VerificationError(f"{place}: no such file")
    try:
        model = onnx.load(str(place), load_external_data=False)
    except (DecodeError, ValueError, OSError, RuntimeError) as error:
        raise VerificationError(
            f"{place}: not an ONNX file, or a truncated one ({one_line(error)})"
        ) from error
    if not model.ir_version or not (model.graph.node or model.graph.output):
        raise VerificationError(f"{place}: not an ONNX file: it holds no graph")
    external = [t for t in _tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        _check_external(place, tensor)
    try:
        load_external_data_for_model(model, str(place.parent))
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise VerificationError(
            f"{place}: its external data cannot be read: {one_line(error)}"
        ) from error
    opened = OnnxFile(place, model, bool(external))
    _check_values(opened)
    return opened


def _tensors(model: onnx.ModelProto) -> Iterator[Any]:
    yield from model.graph.initializer
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _check_external(place: Path, tensor: Any) -> None:
    info = ExternalDataInfo(tensor)
    where = f"{place}: {tensor.name or 'a constant'}: external data {info.location!r}"
    folder = place.parent.resolve()
    target = (folder / info.location).resolve()
    if not info.location or not target.is_relative_to(folder):
        raise VerificationError(f"{where} lies outside of the model's folder; refused")
    if not target.is_file():
        raise VerificationError(f"{where} is missing; keep it beside the model")
    offset = info.offset or 0
    needed = _nbytes(tensor)
    length = info.length if info.length is not None else needed
    if length != needed:
        raise VerificationError(f"{where} has {length} bytes, its shape needs {needed}")
    if offset + length > target.stat().st_size:
        raise VerificationError(
            f"{where} is too short: bytes {offset} to {offset + length} of {target.stat().st_size}"
        )


def _nbytes(tensor: Any) -> int:
    count = math.prod(tensor.dims)
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    packed = onnx.TensorProto.DataType.Name(tensor.data_type) in ("INT4", "UINT4", "FLOAT4E2M1")
    return -(-count // 2) if packed else int(count * kind.itemsize)


def _check_values(opened: OnnxFile) -> None:
    for tensor in opened.model.graph.initializer:
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            continue
        try:
            value = numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise VerificationError(
                f"{opened.path}: {tensor.name}: its data does not fit its shape "
                f"{tuple(tensor.dims)}: {one_line(error)}"
            ) from error
        if wrong := int(np.isnan(value).sum()):
            raise VerificationError(
                f"{opened.path}: initializer {tensor.name}: {wrong} of {value.size} values are NaN"
            )


def too_large(model: onnx.ModelProto) -> bool:
    """Return whether a model's tensors leave no room in one protobuf message."""
    return sum(map(_nbytes, _tensors(model))) > _IN_ONE_MESSAGE


def structure_problems(opened: OnnxFile) -> list[str]:
    """Return what the checker and a look at the graph find wrong."""
    problems = [*_checker(opened)]
    for node in all_nodes(opened.model.graph):
        label = node.name or f"{node.op_type} -> {', '.join(node.output)}"
        problems += [
            f"{label}: {node.op_type} is in training mode"
            for attribute in node.attribute
            if attribute.name == "training_mode" and attribute.i
        ]
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            flag = _constant(opened.model, node.input[2])
            if flag is None or bool(flag.any()):
                problems.append(f"{label}: Dropout is in training mode")
    problems += [
        f"initializers {first} and {second} hold the same {size} bytes"
        for first, second, size in duplicates(opened.model)
    ]
    return problems


def _checker(opened: OnnxFile) -> Iterator[str]:
    try:
        whole = opened.external and not too_large(opened.model)
        onnx.checker.check_model(opened.model if whole else str(opened.path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield f"onnx.checker: {one_line(error)}"


def _constant(model: onnx.ModelProto, name: str) -> np.ndarray[Any, Any] | None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    for node in all_nodes(model.graph):
        if node.op_type == "Constant" and name in node.output:
            return numpy_helper.to_array(node.attribute[0].t)
    return None


def duplicates(model: onnx.ModelProto) -> list[tuple[str, str, int]]:
    """Return pairs of large initializers with the same content; constant ones are not worth it."""
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    found = []
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        if len(raw) < LARGE or raw == raw[:8] * (len(raw) // 8):
            continue
        key = (tensor.data_type, tuple(tensor.dims), hashlib.blake2b(raw).digest())
        if key in seen:
            found.append((seen[key], tensor.name, len(raw)))
        seen.setdefault(key, tensor.name)
    return found
