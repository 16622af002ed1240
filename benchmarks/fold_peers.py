"""Folding the corpus, beside torch.fx and torchao: norms folded, norms left, outputs that changed.

    python -m benchmarks.fold_peers                          one architecture a family; resumable
    python -m benchmarks.fold_peers timm:resnet18            these alone
    python -m benchmarks.fold_peers --summarize --write      docs/benchmarks.md from the rows

Each architecture and tool is a process of its own with a limit of time and of memory, and a JSON
line; what has one is not run again. Models have random weights and norms and the smallest of the
usual inputs, in float64 where they run in it. Norms are counted by running the model: one is a
running mean that a batch norm is given. An output is wrong if it is off by more than 1e-3 of its
largest value, and by 100 times more than a change of the input by 1e-14 moves it.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import corpus
from benchmarks._table import environment, parser, publish, table
from benchmarks.folders import FOLDERS, Folder, installed
from benchmarks.sweep.outputs import relative_difference
from benchmarks.sweep.peers import short
from benchmarks.sweep.rows import Row, append, read
from benchmarks.sweep.workers import Limits, run_all

RESULTS = Path(__file__).parent / "fold_peers.jsonl"
TOOLS = ("torch.fx fuse", "torchao pt2e", "ours")
WRONG = 1e-3
_PRELOADED = ("torch.fx.experimental.optimization", "passes")
_BATCH_NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
})  # fmt: skip
_RUNNING_MEAN = 3  # among the arguments of each


class CountNorms(TorchDispatchMode):
    """Note the running mean of every batch norm that runs, however it is spelled.

    Instance norms run as batch norms without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in _BATCH_NORMS:
            mean = args[_RUNNING_MEAN]
            if isinstance(mean, Tensor):
                self.means[id(mean)] = mean  # held, so that no identity is used twice
        return func(*args, **(kwargs or {}))


def run(model: Any, inputs: tuple[Any, ...]) -> tuple[Any, int]:
    """Return the output of one run, and how many batch norms it computed."""
    torch.manual_seed(0)
    with torch.no_grad(), CountNorms() as norms:
        output = model(*inputs)
    return output, len(norms.means)


def measure(pair: str, build: Callable[[str], tuple[nn.Module, Any]] = corpus.build) -> Row:
    """Return the row of `ARCHITECTURE by TOOL`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    architecture, _, tool = pair.partition(" by ")
    row: Row = {"name": pair, "architecture": architecture, "tool": tool}
    start = time.perf_counter()
    try:
        model, inputs = build(architecture)
    except corpus.UnbuildableError as error:
        return row | {"status": "unbuildable", "error": str(error)[:160]}
    model, inputs, want, norms = _in_float64(model, inputs)
    row |= {"status": "run", "dtype": _dtype(model), "norms": norms}
    row |= _fold(FOLDERS[tool], model, inputs, want) if norms else {"left": 0, "off": 0.0}
    if row.get("off", 0) > WRONG:
        row["rounding"] = _rounding(build, architecture, row["dtype"])
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _in_float64(
    model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[nn.Module, tuple[Any, ...], Any, int]:
    """Return model, inputs, output and norms that run: in float64, or as they are without it."""
    wide = _cast(inputs, torch.float64)
    try:
        return model.double(), wide, *run(model, wide)
    except Exception:  # noqa: BLE001 - code that makes float32 tensors does not run in float64
        return model.float(), inputs, *run(model, inputs)


def _fold(tool: Folder, model: nn.Module, inputs: tuple[Any, ...], want: Any) -> Row:
    try:
        got, left = run(tool(model, inputs), inputs)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a tool may fail in any way; that is its row
        return {"error": short(error)}
    return {"left": left, "off": relative_difference(want, got)}


def _rounding(
    build: Callable[[str], tuple[nn.Module, Any]], architecture: str, dtype: str
) -> float:
    """Return how far the output moves when the inputs move by float64's rounding."""
    model, inputs = build(architecture)
    kind = getattr(torch, dtype)
    model, inputs = model.to(kind), _cast(inputs, kind)
    step = 1e-14 if kind is torch.float64 else 1e-6
    moved = tree_map_only(Tensor, lambda x: x * (1 + step) if x.is_floating_point() else x, inputs)
    return relative_difference(run(model, inputs)[0], run(model, moved)[0])


def _cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def _dtype(model: nn.Module) -> str:
    found = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return str(found[0] if found else torch.float32).removeprefix("torch.")


def is_wrong(row: Row) -> bool:
    """Return whether the tool changed the function, and not merely its rounding."""
    return bool(row.get("off", 0) > max(WRONG, 100 * row.get("rounding", 0)))


def failure(row: Row) -> str | None:
    """Return how the tool failed, or None if it returned a model that runs."""
    if row["status"] != "run":
        return str(row["status"])
    return row["error"].partition(":")[0] if "error" in row else None


def summary(rows: Sequence[Row], wanted: int) -> str:
    """Return the tables: totals of each tool, then a row for each architecture with norms."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["architecture"], {})[row["tool"]] = row
    done = {a: r for a, r in by_name.items() if all(tool in r for tool in TOOLS)}
    unbuilt = [a for a, r in done.items() if any(x["status"] == "unbuildable" for x in r.values())]
    known = {a: max(x.get("norms", 0) for x in r.values()) for a, r in done.items()}
    compared = {a: r for a, r in done.items() if known[a]}
    without = [a for a in done if not known[a] and a not in unbuilt]
    narrow = [
        a for a, r in compared.items() if any(x.get("dtype") == "float32" for x in r.values())
    ]
    lines = [
        f"{len(done)} of {wanted} architectures have been run; {len(compared)} of them run batch "
        f"norms, {sum(known[a] for a in compared)} in all."
    ]
    lines += [f"{title}: {', '.join(names)}." for title, names in (
        ("No batch norm runs in", without), ("Not built", unbuilt),
        ("In float32, because they do not run in float64", narrow),
    ) if names]  # fmt: skip
    totals = [_totals(tool, compared, known) for tool in TOOLS]
    cells = [[a, known[a], *(_cell(r[tool]) for tool in TOOLS)] for a, r in compared.items()]
    header = [
        "tool", "norms folded", "left", "folded into a wrong output", "in models it fails on",
        "models it fails on", "models silently wrong",
    ]  # fmt: skip
    parts = ["\n".join(lines), table(header, totals), _CELLS]
    return "\n\n".join([*parts, table(["architecture", "norms", *TOOLS], cells)])


_CELLS = "Norms left in each; *fails* with the exception, **wrong** with the relative error."


def _totals(tool: str, compared: dict[str, dict[str, Row]], known: dict[str, int]) -> list[object]:
    rows = {a: r[tool] for a, r in compared.items()}
    failed = [a for a, row in rows.items() if failure(row)]
    wrong = [a for a, row in rows.items() if is_wrong(row)]
    left = sum(row["left"] for a, row in rows.items() if a not in failed)
    lost = sum(known[a] for a in failed)
    spoilt = sum(known[a] - rows[a]["left"] for a in wrong)
    folded = sum(known.values()) - left - lost - spoilt
    return [tool, folded, left, spoilt, lost, len(failed), len(wrong)]


def _cell(row: Row) -> str:
    if reason := failure(row):
        return f"fails ({reason})"
    return f"{row['left']}, **wrong** ({row['off']:.1g})" if is_wrong(row) else str(row["left"])


def sweep(names: Sequence[str], options: argparse.Namespace) -> None:
    """Measure what has no row yet, and append each row as it comes."""
    tools = [tool for tool in TOOLS if tool in installed(FOLDERS)[0]]
    rows = {row["name"] for row in read(options.results)}
    pairs = [f"{name} by {tool}" for name in names for tool in tools]
    pending = [pair for pair in pairs if pair not in rows]
    packages = sorted({pair.partition(":")[0] for pair in pending})
    preloaded = [*_PRELOADED, *(["torchao.quantization.pt2e.utils"] if len(tools) > 2 else [])]
    for module in [*(f"benchmarks.corpus.{name}_source" for name in packages), *preloaded]:
        importlib.import_module(module)  # once, before the forks
    limits = Limits(options.seconds, options.megabytes)
    for row in run_all(pending, measure, limits, options.workers):
        architecture, _, tool = row["name"].partition(" by ")
        append(options.results, {"architecture": architecture, "tool": tool} | row)


def main() -> None:
    """Run what has no row, print the tables, and write them when asked to."""
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", metavar="PACKAGE:ARCHITECTURE")
    arguments.add_argument("--results", type=Path, default=RESULTS)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--seconds", type=float, default=240, help="limit for one process")
    arguments.add_argument("--megabytes", type=int, default=10_000, help="limit for one process")
    arguments.add_argument("--summarize", action="store_true", help="run nothing")
    options = arguments.parse_args()
    names = [n for n in options.names or corpus.QUICK if corpus.installed(n)]
    if not options.summarize:
        sweep(names, options)
    rows = [row for row in read(options.results) if row["architecture"] in names]
    packages = ("torchao", "timm", "torchvision", "segmentation_models_pytorch", "transformers")
    text = f"{environment(*packages, 'pytorchcv')}\n\n{summary(rows, len(names))}"
    publish("fold-peers", "Folding the corpus, beside other tools", text, write=options.write)


if __name__ == "__main__":
    main()
