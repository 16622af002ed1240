"""Negative controls for ONNX: this verifier beside torch.onnx.verification on the same files.

    python -m benchmarks.verify_controls

One thing is made wrong in an exported graph. `torch.onnx.verification.verify_onnx_program` compares
intermediate values by name and gives distances, no verdict: it is judged here by PyTorch's own
defaults for float32 (`torch.testing.assert_close`), and by the limits of its own warning. "Located"
means that the first value beyond the limit is the output of the node that was made wrong.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from torch import nn
from torch.onnx.verification import verify_onnx_program

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import make
from rewrite.errors import RewriteError
from rewrite.onnx import verify_onnx
from rewrite.verification import Level

MODELS = ("timm:resnet18", "timm:convnext_atto", "timm:mobilenetv3_small_050")
SIZE = 96
# torch.testing.assert_close's defaults for float32, and the limits of the exporter's own warning.
STRICT, WARNING = (1.3e-6, 1e-5), (0.1, 0.01)
HEADER = ["model: fault", "ours", "located", "assert_close", "located", "its warning", "located"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__)
    options.add_argument("names", nargs="*", default=MODELS, metavar="PACKAGE:ARCHITECTURE")
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = [row for name in chosen.names for row in controls(name)]
    publish("verify-controls", "Negative controls for ONNX", _body(rows), write=chosen.write)


def _body(rows: list[list[str]]) -> str:
    wrong = [row for row in rows if not row[0].endswith("nothing")]

    def count(column: int, word: str) -> str:
        return f"{sum(row[column] == word for row in wrong)} of {len(wrong)}"

    summary = (
        f"{environment('onnx', 'onnxruntime', 'timm')}. Caught and located: ours "
        f"{count(1, 'caught')} and {count(2, 'yes')}; `verify_onnx_program` by assert_close "
        f"{count(3, 'caught')} and {count(4, 'yes')}, by its warning {count(5, 'caught')} and "
        f"{count(6, 'yes')}. The rows with nothing wrong show false alarms."
    )
    return f"{summary}\n\n{table(HEADER, rows)}"


def controls(name: str) -> list[list[str]]:
    """Return a row for each fault in one architecture."""
    model = make(name)
    x = torch.randn(2, 3, SIZE, SIZE)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(str(path))
        right = onnx.load(path)
        for fault, spoil in FAULTS.items():
            wrong = onnx.ModelProto()
            wrong.CopyFrom(right)
            node = spoil(wrong)
            if node is None:
                continue
            onnx.save(wrong, path)
            program.model = onnx_ir.from_proto(wrong)
            cells = [*_ours(path, model, x, node), *_theirs(program, x, node)]
            rows.append([f"{name.partition(':')[2]}: {fault}", *cells])
    return rows


def _ours(path: Path, model: nn.Module, x: torch.Tensor, node: str) -> list[str]:
    try:
        found = verify_onnx(path, model, (x,), level=Level.QUICK)
    except RewriteError as error:
        return [f"refused: {error}"[:60], ""]
    located = found.divergence is not None and found.divergence.node == node
    return ["passed" if found.ok else "caught", _yes(located, node)]


def _theirs(program: Any, x: torch.Tensor, node: str) -> list[str]:
    try:
        infos = verify_onnx_program(program, (x,), compare_intermediates=True)
    except Exception as error:  # noqa: BLE001 - what a peer does is what is measured
        return [f"crashed: {type(error).__name__}", "", "crashed", ""]
    made = {output.name: str(n.name) for n in program.model.graph for output in n.outputs}
    cells = []
    for relative, absolute in (STRICT, WARNING):
        beyond = [i for i in infos if i.max_abs_diff > absolute and i.max_rel_diff > relative]
        located = bool(beyond) and made.get(beyond[0].name) == node
        cells += ["caught" if beyond else "passed", _yes(located, node)]
    return cells


def _yes(located: bool, node: str) -> str:
    return "" if not node else "yes" if located else "no"


# -- faults: each makes one thing wrong and returns the node where it shows -----------------------


def _weights(model: onnx.ModelProto) -> list[Any]:
    return [t for t in model.graph.initializer if len(t.dims) == 4 and t.data_type == 1]


def _user(model: onnx.ModelProto, name: str) -> str:
    return next(str(n.name) for n in model.graph.node if name in n.input)


def _change(model: onnx.ModelProto, change: Callable[[Any], Any]) -> str:
    weights = _weights(model)
    tensor = weights[len(weights) // 2]
    value = change(numpy_helper.to_array(tensor).copy()).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return _user(model, tensor.name)


def _one(value: Any) -> Any:
    value.reshape(-1)[value.size // 2] += 1e-3
    return value


def _swapped(value: Any) -> Any:
    value[[0, 1]] = value[[1, 0]]
    return value


def _channel(value: Any) -> Any:
    value[-1] *= 1 + 1e-4
    return value


def _attribute(kind: str, key: str, change: Callable[[Any], None]) -> Callable[[Any], str | None]:
    def spoil(model: onnx.ModelProto) -> str | None:
        found = [
            (node, attribute)
            for node in model.graph.node
            if node.op_type == kind
            for attribute in node.attribute
            if attribute.name == key
        ]
        if not found:
            return None
        node, attribute = found[len(found) // 2]
        change(attribute)
        return str(node.name)

    return spoil


def _shifted(attribute: Any) -> None:
    pads = list(attribute.ints)
    attribute.ints[:] = [pads[0] + pads[2], pads[1], 0, pads[3]]


def _inputs(model: onnx.ModelProto) -> str | None:
    """Swap the inputs of one operator that is not symmetric."""
    nodes = [n for n in model.graph.node if n.op_type in ("Sub", "Div", "Pow")]
    if not nodes:
        return None
    node = nodes[len(nodes) // 2]
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return str(node.name)


def _lost(model: onnx.ModelProto) -> str | None:
    """Take one activation out; its readers are the first to be wrong."""
    nodes = [n for n in model.graph.node if n.op_type in ("Relu", "HardSwish", "Gelu")]
    if len(nodes) < 2:
        return None
    node = nodes[len(nodes) // 2]
    node.op_type = "Identity"
    del node.attribute[:]
    return str(node.name)


FAULTS: dict[str, Callable[[Any], str | None]] = {
    "nothing": lambda model: "",
    "a weight +1e-3": lambda model: _change(model, lambda value: value + 1e-3),
    "one element +1e-3": lambda model: _change(model, _one),
    "one channel x (1 + 1e-4)": lambda model: _change(model, _channel),
    "two channels swapped": lambda model: _change(model, _swapped),
    "pads shifted": _attribute("Conv", "pads", _shifted),
    "epsilon 1e-2": _attribute(
        "LayerNormalization", "epsilon", lambda attribute: setattr(attribute, "f", 1e-2)
    ),
    "alpha 1.001": _attribute("Gemm", "alpha", lambda attribute: setattr(attribute, "f", 1.001)),
    "two inputs swapped": _inputs,
    "an activation lost": _lost,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
