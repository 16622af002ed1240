"""How GroupNorm, InstanceNorm and LayerNorm run in onnxruntime, by the opset they are exported at.

    python -m benchmarks.norm_opsets

Four convolutions, each followed by the norm and a ReLU, on 64 channels of 28 x 28. The sessions
take turns, and times are the fastest of many: ratios to the fastest opset of the same norm.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from benchmarks._table import environment, parser, publish, table
from rewrite.onnx.export import export

OPSETS = (18, 20, 21, 22)
NORMS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(8, 64),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(64, affine=True),
    "LayerNorm": lambda: nn.LayerNorm([64, 28, 28]),
}
HEADER = ["norm", "opset", "operators of one norm", "error", "noise", "verified", "time"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=30)
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = [row for name in NORMS for row in measured(name, chosen.repeats)]
    body = f"{environment('onnx', 'onnxruntime')}.\n\n{table(HEADER, rows)}"
    publish("norm-opsets", "Norms in onnxruntime by opset", body, write=chosen.write)


def measured(name: str, repeats: int) -> list[list[Any]]:
    """Return a row for each opset of one norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        norm = NORMS[name]()
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
        layers += [nn.Conv2d(64, 64, 3, padding=1), norm, nn.ReLU()]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(1, 64, 28, 28)
    found, sessions = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for opset in OPSETS:
            path = Path(folder) / f"{opset}.onnx"
            found[opset] = export(model, path, example_inputs=(x,), opset=opset)
            sessions[opset] = onnxruntime.InferenceSession(str(path))
    best = dict.fromkeys(OPSETS, float("inf"))
    for _ in range(repeats):
        for opset, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: x.numpy()})
            best[opset] = min(best[opset], time.perf_counter() - begin)
    fastest = min(best.values())
    return [
        [
            name, opset, _operators(found[opset].operator_counts), f"{found[opset].max_rel:.0e}",
            f"{found[opset].noise:.0e}", "yes" if found[opset].ok else "no",
            f"{best[opset] / fastest:.2f}",
        ]
        for opset in OPSETS
    ]  # fmt: skip


def _operators(census: Any) -> str:
    kinds = {kind: count for kind, count in census.items() if kind not in ("Conv", "Relu")}
    return ", ".join(kinds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
