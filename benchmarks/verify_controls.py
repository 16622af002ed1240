"""Negative controls for ONNX: this verifier beside torch.onnx.verification on the same files.

    python -m benchmarks.verify_controls            the models below; about five minutes
    python -m benchmarks.verify_controls --write    and put the table into docs/benchmarks.md

One thing is made wrong in an exported graph. `torch.onnx.verification.verify_onnx_program` compares
intermediate values by name and gives distances, no verdict: it is judged here by PyTorch's own
defaults for float32 (`torch.testing.assert_close`), and by the limits of its own warning. "Located"
means that the first value beyond the limit is the output of the node that was made wrong. Seconds
are of the wall and of one verification: the peer makes a session for each value.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
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

import models
from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import make
from models.digits_resnet import load_digits_resnet
from rewrite.equivalence.verification import Level
from rewrite.errors import RewriteError
from rewrite.onnx.verify import verify_onnx

MODELS = ("digits_resnet", "transformer", "difference", "timm:resnet18")
SIZE = 96
LOST = "an activation lost"
# torch.testing.assert_close's defaults for float32, and the limits of the exporter's own warning.
STRICT, WARNING = (1.3e-6, 1e-5), (0.1, 0.01)
HEADER = [
    "model: fault", "ours", "located", "seconds",
    "assert_close", "located", "its warning", "located", "seconds",
]  # fmt: skip


class Difference(nn.Module):
    """A convolution, a LayerNorm, a difference and a linear layer: operators with an order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm([8, 8])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.first(x))
        return self.head((a - self.norm(self.middle(a))).mean((2, 3))).softmax(-1)


def subject(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a model in eval mode and inputs for it."""
    torch.manual_seed(0)
    if name == "difference":
        net = Difference().eval()
        nn.init.normal_(net.norm.weight)
        return net, (torch.randn(2, 3, 8, 8),)
    if name == "digits_resnet":
        return load_digits_resnet().eval(), (torch.randn(2, 1, 8, 8),)
    if ":" not in name:
        model = models.randomize_norms_(models.all_models()[name]()).eval()
        return model, models.example_inputs(name)
    return make(name), (torch.randn(2, 3, SIZE, SIZE),)


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
        f"{count(4, 'caught')} and {count(5, 'yes')}, by its warning {count(6, 'caught')} and "
        f"{count(7, 'yes')}. The rows with nothing wrong show false alarms. Not caught by ours: "
        f"{', '.join(row[0] for row in wrong if row[1] != 'caught') or 'none'}."
    )
    return f"{summary}\n\n{table(HEADER, rows)}"


def controls(name: str) -> list[list[str]]:
    """Return a row for each fault in one architecture."""
    model, inputs = subject(name)
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    gc.freeze()
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
            places = {node, *_readers(wrong, node)} if fault == LOST else {node}
            onnx.save(wrong, path)
            program.model = onnx_ir.from_proto(wrong)
            cells = [*_ours(path, model, inputs, places), *_theirs(program, inputs, places)]
            rows.append([f"{name.rpartition(':')[2]}: {fault}", *cells])
    return rows


def _ours(path: Path, model: nn.Module, inputs: tuple[Any, ...], places: set[str]) -> list[str]:
    begin = time.perf_counter()
    try:
        found = verify_onnx(path, model, inputs, level=Level.QUICK)
    except RewriteError as error:
        return [f"refused: {error}"[:60], "", ""]
    located = found.divergence is not None and found.divergence.node in places
    seconds = time.perf_counter() - begin
    return ["passed" if found.ok else "caught", _yes(located, places), f"{seconds:.1f}"]


def _theirs(program: Any, inputs: tuple[Any, ...], places: set[str]) -> list[str]:
    begin = time.perf_counter()
    try:
        infos = verify_onnx_program(program, inputs, compare_intermediates=True)
    except Exception as error:  # noqa: BLE001 - what a peer does is what is measured
        return [f"crashed: {type(error).__name__}", "", "crashed", "", ""]
    seconds = time.perf_counter() - begin
    made = {output.name: str(n.name) for n in program.model.graph for output in n.outputs}
    cells = []
    for relative, absolute in (STRICT, WARNING):
        beyond = [i for i in infos if i.max_abs_diff > absolute and i.max_rel_diff > relative]
        located = bool(beyond) and made.get(beyond[0].name) in places
        cells += ["caught" if beyond else "passed", _yes(located, places)]
    return [*cells, f"{seconds:.1f}"]


def _yes(located: bool, places: set[str]) -> str:
    return "" if places == {""} else "yes" if located else "no"


def _readers(model: onnx.ModelProto, name: str) -> list[str]:
    """Return the nodes that read what a node makes."""
    made = {output for n in model.graph.node if n.name == name for output in n.output}
    return [str(n.name) for n in model.graph.node if made & set(n.input)]


# -- faults: each makes one thing wrong and returns the node where it shows -----------------------


def _weights(model: onnx.ModelProto) -> list[Any]:
    return [t for t in model.graph.initializer if len(t.dims) in (2, 4) and t.data_type == 1]


def _user(model: onnx.ModelProto, name: str) -> str:
    return next(str(n.name) for n in model.graph.node if name in n.input)


def _change(model: onnx.ModelProto, change: Callable[[Any], Any]) -> str:
    weights = _weights(model)
    tensor = weights[len(weights) // 2]
    value = change(numpy_helper.to_array(tensor).copy()).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return _user(model, tensor.name)


def _noisy(value: Any) -> Any:
    """Move each element: a constant for all of them would be lost in a softmax or LayerNorm."""
    return value + np.random.default_rng(0).choice([-1e-3, 1e-3], value.shape)


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
    """Take one activation out: its readers are the first whose value is nowhere else."""
    nodes = [n for n in model.graph.node if n.op_type in ("Relu", "HardSwish", "Gelu")]
    if len(nodes) < 2:
        return None
    node = nodes[len(nodes) // 2]
    node.op_type = "Identity"
    del node.attribute[:]
    return str(node.name)


FAULTS: dict[str, Callable[[Any], str | None]] = {
    "nothing": lambda model: "",
    "a weight ± 1e-3": lambda model: _change(model, _noisy),
    "one element +1e-3": lambda model: _change(model, _one),
    "one channel x (1 + 1e-4)": lambda model: _change(model, _channel),
    "two channels swapped": lambda model: _change(model, _swapped),
    "pads shifted": _attribute("Conv", "pads", _shifted),
    "epsilon 1e-2": _attribute(
        "LayerNormalization", "epsilon", lambda attribute: setattr(attribute, "f", 1e-2)
    ),
    "alpha 1.001": _attribute("Gemm", "alpha", lambda attribute: setattr(attribute, "f", 1.001)),
    "two inputs swapped": _inputs,
    LOST: _lost,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
