"""Save a diverging ONNX node as a minimal reproduction: one node, its inputs and its outputs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from rewrite.equivalence.divergence import Divergence
from rewrite.errors import VerificationError, system_reason
from rewrite.files import atomic_path, publish_folder, scratch_folder, together
from rewrite.onnx.file import OnnxFile, initializer
from rewrite.onnx.values import values_of
from rewrite.onnx.vetting.made_up import Feed

_SCRIPT = '''"""{title}"""
import numpy as np
import onnxruntime

inputs = dict(np.load("inputs.npz"))
expected = np.load("expected.npz")
session = onnxruntime.InferenceSession("node.onnx", providers=["CPUExecutionProvider"])
for value, output in zip(session.get_outputs(), session.run(None, inputs)):
    if value.name in expected:
        print(value.name, "differs by", np.abs(output - expected[value.name]).max())
'''


def write_repro(
    folder: str | Path,
    opened: OnnxFile,
    feed: Feed,
    divergence: Divergence,
    expected: np.ndarray[Any, Any] | None = None,
) -> Path:
    """Write a folder that shows one node being wrong.

    `expected` is what the node should have made, if the reference has such a value.

    It holds node.onnx, inputs.npz, actual.npz, expected.npz and repro.py.

    Raises:
        VerificationError: the folder cannot be written, or the node is gone.
    """
    graph = opened.model.graph
    node = next((n for n in graph.node if divergence.node in (n.name, n.output[0])), None)
    if node is None:
        raise VerificationError(f"{opened.path}: no node {divergence.node} to write a repro of")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    given = [name for name in node.input if name and name not in weights]
    outputs = [name for name in node.output if name]
    fetched = dict(values_of(opened, feed, [n for n in given if n not in feed] + outputs))
    inputs: dict[str, Any] = {
        name: feed.get(name, fetched.get(name)) for name in dict.fromkeys(given)
    }
    with _complete(Path(folder)) as place:
        onnx.save(_one_node(opened, node, inputs, fetched, weights), str(place / "node.onnx"))
        np.savez(place / "inputs.npz", **inputs)
        np.savez(place / "actual.npz", **{name: fetched[name] for name in outputs})
        np.savez(place / "expected.npz", **_expected(expected, outputs[0], fetched[outputs[0]]))
        (place / "repro.py").write_text(_SCRIPT.format(title=divergence.note))
    return Path(folder)


def check_folder(folder: str | Path) -> Path:
    """Raise VerificationError when `folder` cannot become a folder of files; touch nothing."""
    place = Path(folder)
    try:
        if place.exists() and not place.is_dir():
            raise VerificationError(f"{place}: is a file; give a folder for the repro")
        if not place.absolute().parent.is_dir():
            raise VerificationError(
                f"{place}: the folder {place.parent} does not exist; create it first"
            )
    except OSError as error:
        raise VerificationError(f"{place}: {system_reason(error)}") from error
    return place


@contextlib.contextmanager
def _complete(place: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files end up in `place`, all of them or none."""
    check_folder(place)
    try:
        with contextlib.ExitStack() as kept:
            folder = kept.enter_context(scratch_folder(place.absolute().parent, ".repro."))
            made = folder / place.name
            made.mkdir()
            yield made
            if not place.exists():
                publish_folder(made, place, kept.pop_all())
                return
            blocked = [file.name for file in made.iterdir() if (place / file.name).is_dir()]
            if blocked:
                raise VerificationError(f"{place / blocked[0]}: is a folder; give another place")
            with together():
                for file in made.iterdir():
                    with atomic_path(place / file.name) as staged:
                        shutil.copyfile(file, staged)
    except OSError as error:
        raise VerificationError(f"{place}: cannot be written: {system_reason(error)}") from error


def _expected(value: np.ndarray[Any, Any] | None, name: str, actual: Any) -> dict[str, Any]:
    """Return the expected output in the form of the actual one; nothing where they do not fit."""
    if value is None or value.size != actual.size:
        return {}
    return {name: value.reshape(actual.shape)}


def _one_node(
    opened: OnnxFile,
    node: Any,
    inputs: dict[str, Any],
    fetched: dict[str, Any],
    weights: dict[str, Any],
) -> onnx.ModelProto:
    def value(name: str, array: Any) -> Any:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)
        return onnx.helper.make_tensor_value_info(name, kind, np.asarray(array).shape)

    graph = onnx.helper.make_graph(
        [node],
        "repro",
        [value(name, array) for name, array in inputs.items()],
        [value(name, fetched[name]) for name in node.output if name],
        [
            numpy_helper.from_array(initializer(opened, weights[name]), name)
            for name in dict.fromkeys(node.input)
            if name in weights
        ],
    )
    made = onnx.helper.make_model(graph, opset_imports=opened.model.opset_import)
    made.ir_version = opened.model.ir_version
    made.functions.extend(opened.model.functions)
    return made
