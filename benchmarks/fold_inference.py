"""How fast models run after folding: eager PyTorch and onnxruntime, one model of each family.

    python -m benchmarks.fold_inference            medians of paired ratios of interleaved runs
    python -m benchmarks.fold_inference --write    and put them into docs/benchmarks.md

For each model and batch size, four runners take turns: the unfolded model, torch.fx's fused one,
ours, and (onnxruntime) the unfolded model's graph, which onnxruntime fuses by itself. Numbers are
speed-ups over the unfolded model in the same runtime: above 1 is faster. `left` counts the batch
norms that still run in the graph after torch.fx and after us. The ratios are taken turn by turn, so
that other work on the machine slows both sides of each; the table is written after each model.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.folders import ours, torch_fx
from benchmarks.scoreboard import run

MODELS = (
    "resnet18", "mobilenetv3_small_050", "regnety_002", "ghostnet_050", "mobileone_s0", "repvgg_a0",
    "efficientnet_lite0", "levit_128s", "mobilevit_xxs", "dla46_c", "fastvit_t8", "densenet121",
    "resnetv2_18", "convnext_atto", "repghostnet_050", "hrnet_w18_small", "efficientformer_l1",
    "res2net50_14w_8s", "convmixer_768_32", "vgg11_bn",
)  # fmt: skip


def speedups(runners: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return how much faster than "unfolded" each runner is: the median over turns of the ratio.

    The runners take turns, and the first turn does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner()
            if number:
                times[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(times["unfolded"], values, strict=True))
        for name, values in times.items()
    }


def session(model: nn.Module, x: torch.Tensor) -> Any:
    """Return an onnxruntime session of a model, all of its optimizations on, two threads."""
    import onnxruntime

    buffer: Any = io.BytesIO()
    torch.onnx.export(
        model, (x,), buffer, dynamo=False, do_constant_folding=False, input_names=["x"],
        output_names=["y"], dynamic_axes={"x": {0: "batch"}},
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(buffer.getvalue(), options)


def measure(name: str, size: int, batches: Sequence[int], rounds: int) -> list[list[object]]:
    """Return one row a batch size: speed-ups over the unfolded model."""
    import timm

    import models

    torch.manual_seed(0)
    model = models.randomize_norms_(timm.create_model(name)).eval()
    example = torch.randn(2, 3, size, size)
    found = {"unfolded": model}
    # A tool that fails on a model has empty cells.
    with contextlib.suppress(Exception):
        found["fx"] = torch_fx(model, (example,))
    found["ours"] = ours(timm_copy(model), (example,))
    left = {key: run(value, (example[:1],)).norms for key, value in found.items()}
    sessions = {key: session(value, example) for key, value in found.items()}
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, size, size)
        feed = {"x": x.numpy()}
        with torch.inference_mode():
            eager = speedups({k: partial(m, x) for k, m in found.items()}, rounds)
        onnx = speedups({k: partial(s.run, None, feed) for k, s in sessions.items()}, rounds)
        rows.append(
            [
                name, batch, left["unfolded"], left.get("fx", ""), left["ours"],
                _cell(eager, "fx"), _cell(eager, "ours"), _cell(onnx, "fx"), _cell(onnx, "ours"),
            ]
        )  # fmt: skip
    return rows


def _cell(found: dict[str, float], key: str) -> object:
    return f"{found[key]:.2f}" if key in found else ""


def timm_copy(model: nn.Module) -> nn.Module:
    """Return a copy that shares what folding does not change."""
    from rewrite.runtime.copying import copy_model

    return copy_model(model)


def mean_row(rows: list[list[object]]) -> list[object]:
    """Return the geometric mean of each column of ratios."""
    means = []
    for column in range(5, 9):
        values = [float(str(row[column])) for row in rows if row[column] != ""]
        means.append(f"{math.exp(statistics.fmean(map(math.log, values))):.2f}" if values else "")
    return ["*geometric mean*", "", "", "", "", *means]


def main() -> None:
    """Print the table, and write it when asked to."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7, help="runs that count")
    arguments.add_argument("--size", type=int, default=160, help="height and width of the input")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--models", nargs="+", default=list(MODELS))
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    rows: list[list[object]] = []
    for name in options.models:
        size = 224 if name.startswith(("levit", "efficientformer")) else options.size
        rows += measure(name, size, options.batch, options.rounds)
        text = body(rows, options.size, options.rounds)
        publish("fold-inference", "Inference after folding", text, write=options.write)


def body(rows: list[list[object]], size: int, rounds: int) -> str:
    """Return the table of the rows so far, with what it was measured on."""
    header = ["model", "batch", "norms", "fx left", "ours left", "eager fx", "eager ours",
              "onnxruntime fx", "onnxruntime ours"]  # fmt: skip
    words = f"2 threads, {size} x {size}, medians of {rounds} paired ratios; above 1 is faster"
    text = f"{environment('timm', 'onnxruntime')}, {words}\n\n"
    return text + table(header, [mean_row(rows), *rows])


if __name__ == "__main__":
    main()
