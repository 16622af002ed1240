"""Load an ONNX file from any source; a damaged one is reported in one line.

Nothing in a file is believed: external data has to lie inside the model's folder and have the size
that its tensor needs, before a byte of it is read.

Large weights are held beside the graph, which declares them as external: a graph without them is
copied, changed and handed to onnxruntime at no cost, and no message ends at 2 GiB.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor

from rewrite.errors import VerificationError, one_line
from rewrite.files import no_file
from rewrite.onnx.vetting.expansion import check_expansion
from rewrite.onnx.vetting.nodes import all_nodes, inner_graphs, nodes_of
from rewrite.onnx.vetting.sizes import check_static

LARGE = 64 * 1024
"""From this many bytes on a weight is held beside the graph."""


_HELD = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


_FLOATS = (*_HELD, onnx.TensorProto.BFLOAT16)


Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model in memory, and the file that it came from.

    `weights` holds the data of the large initializers, which `model` only declares.
    """

    path: Path
    model: onnx.ModelProto
    weights: Mapping[str, Array] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        return max(versions, default=0)

    @property
    def nbytes(self) -> int:
        """How many bytes the file and its data hold."""
        return int(self.model.ByteSize()) + sum(value.nbytes for value in self.weights.values())

    @property
    def operator_counts(self) -> dict[str, int]:
        """How often each operator occurs, subgraphs included."""
        counts = Counter(node.op_type for node in all_nodes(self.model.graph))
        return dict(sorted(counts.items(), key=lambda count: (-count[1], count[0])))

    @property
    def inputs(self) -> list[Any]:
        """The graph's inputs that are no initializers."""
        given = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in given]


def open_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file and its external data.

    Raises:
        VerificationError: it is missing, no ONNX file, or its external data is missing, of another
            size, or outside of its folder; or a weight is NaN; or the graph is out of proportion
            to the file (`rewrite.onnx.vetting`).
    """
    place = Path(path)
    if place.is_dir():
        raise VerificationError(f"{place}: is a folder; give the .onnx file inside it")
    if wrong := no_file(place):
        raise VerificationError(f"{place}: {wrong}")
    if not place.is_file():
        raise VerificationError(f"{place}: no such file")
    try:
        model = onnx.load(str(place), load_external_data=False)
    except (DecodeError, ValueError, OSError, RuntimeError) as error:
        raise VerificationError(
            f"{place}: not an ONNX file, or a truncated one; export or download it again "
            f"({one_line(error)})"
        ) from error
    if not model.ir_version or not (model.graph.node or model.graph.output):
        raise VerificationError(f"{place}: not an ONNX file: it holds no graph")
    for name in _names(model.graph):
        if not isinstance(name, str):
            raise VerificationError(f"{place}: holds the name {name!r}, which is no text")
        if not name.isprintable():
            raise VerificationError(f"{place}: holds the name {name!r}, which commands a terminal")
    check_expansion(place, model)
    for tensor in _tensors(model):
        _check_form(place, tensor)
    # An unknown key of external data is a warning to onnx, and nothing to a user.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tensor in _tensors(model):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _check_external(place, tensor)
        graph, weights = _parted(place, model)
    opened = OnnxFile(place, graph, weights)
    for value in opened.inputs:
        if not value.type.tensor_type.elem_type:
            raise VerificationError(
                f"{place}: input {value.name} is no tensor; only graphs of tensors can be run"
            )
    _check_values(opened)
    check_static(place, opened.model, opened.nbytes)
    return opened


def _names(graph: Any) -> Iterator[str | bytes]:
    """Yield the names in a graph and in the graphs inside of it; bytes where one is no UTF-8."""
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _names(inner)


def _parted(place: Path, model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return the graph, its large weights declared only, and their data; `model` is used up."""
    weights = {}
    given = len(model.graph.initializer)
    for index, tensor in enumerate(_tensors(model)):
        if index < given and tensor.data_type in _HELD and _nbytes(tensor) >= LARGE:
            weights[tensor.name] = _data(place, tensor)
            _declare(tensor)
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            _read_external(place, tensor)
    # A message gives the memory of what was cleared back when it dies.
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    return graph, weights


def _data(place: Path, tensor: Any) -> Array:
    """Return the values of a tensor, read from where they are."""
    try:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return np.array(numpy_helper.to_array(tensor))  # theirs cannot be written to
        info = ExternalDataInfo(tensor)
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        target = place.parent / info.location
        flat = np.fromfile(target, kind, math.prod(tensor.dims), offset=info.offset or 0)
        return flat.reshape(tensor.dims)
    except (ValueError, TypeError, OSError) as error:
        raise VerificationError(
            f"{place}: {tensor.name or 'a constant'}: its data does not fit its shape "
            f"{tuple(tensor.dims)}: {one_line(error)}"
        ) from error


def _read_external(place: Path, tensor: Any) -> None:
    try:
        load_external_data_for_tensor(tensor, str(place.parent))
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise VerificationError(
            f"{place}: its external data cannot be read: {one_line(error)}"
        ) from error
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _declare(tensor: Any) -> None:
    """Leave of an initializer its name, type and shape."""
    for name in ("raw_data", "float_data", "double_data", "int32_data"):
        tensor.ClearField(name)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")


def _tensors(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield what the graph, the graphs inside of it and the functions hold; initializers first."""
    yield from model.graph.initializer
    for node in nodes_of(model):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for graph in inner_graphs(node):
            yield from graph.initializer


def _check_form(place: Path, tensor: Any) -> None:
    where = f"{place}: {tensor.name or 'a constant'}"
    if tensor.data_type not in onnx.TensorProto.DataType.values() or not tensor.data_type:
        raise VerificationError(f"{where} is of no type that ONNX knows ({tensor.data_type})")
    if any(size < 0 for size in tensor.dims):
        raise VerificationError(f"{where} has a negative size: {tuple(tensor.dims)}")


def _check_external(place: Path, tensor: Any) -> None:
    where = f"{place}: {tensor.name or 'a constant'}: external data"
    try:
        info = ExternalDataInfo(tensor)
        folder = place.parent.resolve()
        target = (folder / info.location).resolve()
    except ValueError as error:
        raise VerificationError(f"{where} has no readable place: {one_line(error)}") from error
    where += f" {info.location!r}"
    inside = info.location and not Path(info.location).is_absolute()
    if not inside or not target.is_relative_to(folder):
        raise VerificationError(
            f"{where} lies outside of the model's folder; keep it beside the model"
        )
    if not target.is_file():
        raise VerificationError(f"{where} is missing; keep it beside the model")
    offset = info.offset or 0
    needed = _nbytes(tensor)
    length = info.length if info.length is not None else needed
    if length != needed:
        raise VerificationError(f"{where} has {length} bytes, its shape needs {needed}")
    if offset + length > target.stat().st_size:
        raise VerificationError(
            f"{where} is too short: bytes {offset} to {offset + length} of "
            f"{target.stat().st_size}; copy it again"
        )


def _nbytes(tensor: Any) -> int:
    count = math.prod(tensor.dims)
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    packed = onnx.TensorProto.DataType.Name(tensor.data_type) in ("INT4", "UINT4", "FLOAT4E2M1")
    return -(-count // 2) if packed else int(count * kind.itemsize)


def _check_values(opened: OnnxFile) -> None:
    """Raise VerificationError where a tensor's data is not what its shape says, or is NaN."""
    given = len(opened.model.graph.initializer)
    for index, tensor in enumerate(_tensors(opened.model)):
        held = opened.weights.get(tensor.name) if index < given else None
        value = _data(opened.path, tensor) if held is None else held
        # A constant of one element may be NaN on purpose, as the filling of a mask.
        if tensor.data_type not in _FLOATS or (index >= given and value.size < 2):
            continue
        kind = "initializer" if index < given else "constant"
        if _may_hold_nan(value) and (wrong := int(np.isnan(value).sum())):
            raise VerificationError(
                f"{opened.path}: {kind} {tensor.name or '(no name)'}: "
                f"{wrong} of {value.size} values are NaN; export it again from finite weights"
            )


def _may_hold_nan(value: Array) -> bool:
    """Return False where a sum shows that there is no NaN: a tenth of the cost of looking."""
    with np.errstate(all="ignore"):
        return not np.isfinite(value.sum())


def initializer(opened: OnnxFile, tensor: Any) -> Array:
    """Return the values of one of the graph's initializers."""
    value = opened.weights.get(tensor.name)
    return numpy_helper.to_array(tensor) if value is None else value
