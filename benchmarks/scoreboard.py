"""The scoreboard: every trap through every tool, classified.

    python -m benchmarks.scoreboard                 print it
    python -m benchmarks.scoreboard --write         and put it into docs/benchmarks.md

A fold is judged by the output in float64, with random statistics in every norm:

    right      the same function, and norms are gone (how many still run)
    refused    the same function, and every norm still runs
    wrong      another function, with the largest relative error
    crashed    an exception

A swap is right if no batch norm runs afterwards and dtype, mode, frozen parameters and module names
are what they were.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import traps
from benchmarks._table import environment, parser, publish, table
from benchmarks.folders import FOLDERS, SWAPPERS, Folder, clone, installed, versions
from benchmarks.sweep.outputs import tensors

_NORM_OPS = ("native_batch_norm", "_native_batch_norm_legit", "batch_norm", "cudnn_batch_norm")
_TOLERANCE = {torch.float64: 1e-10, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Outcome:
    """What one tool made of one trap."""

    verdict: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verdict} ({self.detail})" if self.detail else self.verdict


class _CountNorms(TorchDispatchMode):
    """Count the batch norms that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += any(name.startswith(op) for op in _NORM_OPS)
        self.products += name == "mul"
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Run:
    """The outputs of one run, and how many batch norms and products it computed."""

    outputs: list[Tensor]
    norms: int
    products: int


def run(model: Any, inputs: tuple[Any, ...]) -> Run:
    """Run a model once."""
    torch.manual_seed(0)
    with torch.no_grad(), _CountNorms() as norms:
        output = model(*inputs)
    return Run(list(tensors(output)), norms.count, norms.products)


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of each output."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)).item()
        for a, b in zip(got, want, strict=True)
        if b.numel()
    ]
    return max(errors, default=0.0)


def judge_fold(tool: Folder, name: str) -> Outcome:
    """Return what folding one trap gives."""
    model, inputs = traps.build(name)
    before = run(model, inputs)
    want = before.outputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            folded = tool(clone(model), inputs)
            after = run(folded, inputs)
        except Exception as failure:  # noqa: BLE001 - a tool may fail in any way; that is its row
            return Outcome("crashed", type(failure).__name__)
    error = difference(after.outputs, want)
    if not error <= _TOLERANCE.get(want[0].dtype, 1e-4):
        return Outcome("**wrong**", f"{error:.2g}")
    ran, left = before.norms, after.norms
    if not ran:  # constants per channel: no norm runs, but products do
        ran, left = before.products, after.products
    if left == ran:
        return Outcome("refused")
    return Outcome("right", f"{left} of {ran} left" if left else "")


def judge_swap(tool: Folder, name: str) -> Outcome:
    """Return what replacing the norms of one trap gives."""
    model, inputs = traps.build(name)
    if next(model.parameters()).dtype is torch.float64:  # what a user would have
        model, inputs = model.float(), tuple(x.float() for x in inputs)
    before = clone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            swapped = tool(clone(model), inputs)
            done = run(swapped, inputs)
        except Exception as error:  # noqa: BLE001 - a tool may fail in any way; that is its row
            return Outcome("crashed", type(error).__name__)
    faults = list(_faults(before, swapped, done.outputs, done.norms))
    return Outcome("**wrong**", ", ".join(faults)) if faults else Outcome("right")


def _faults(before: nn.Module, after: nn.Module, got: list[Tensor], left: int) -> Iterator[str]:
    if left:
        yield f"{left} batch norms still run"
    if not all(bool(torch.isfinite(t).all()) for t in got if t.is_floating_point()):
        yield "not finite"
    if {p.dtype for p in before.parameters()} != {p.dtype for p in after.parameters()}:
        yield "dtype lost"
    modes = {name: m.training for name, m in before.named_modules()}
    if any(m.training != modes.get(name, m.training) for name, m in after.named_modules()):
        yield "train mode changed"
    frozen = {n for n, p in before.named_parameters() if not p.requires_grad}
    if any(n in frozen and p.requires_grad for n, p in after.named_parameters()):
        yield "frozen parameters train"
    if _activations(before) != _activations(after):
        yield "an activation got lost"


def _activations(model: nn.Module) -> int:
    kinds = (nn.ReLU, nn.SiLU, nn.GELU)
    return sum(isinstance(m, kinds) for m in model.modules())


def board(
    tools: dict[str, Folder], names: Sequence[str], judge: Callable[[Folder, str], Outcome]
) -> str:
    """Return the table of one kind of rewrite: a row a trap, the totals first."""
    outcomes = {
        name: {tool: judge(function, name) for tool, function in tools.items()} for name in names
    }
    totals = {tool: Counter(row[tool].verdict for row in outcomes.values()) for tool in tools}
    verdicts = ("right", "refused", "**wrong**", "crashed")
    rows: list[list[object]] = [
        [f"*{verdict.strip('*')}*", *(totals[tool][verdict] for tool in tools)]
        for verdict in verdicts
    ]
    rows += [[name, *(str(row[tool]) for tool in tools)] for name, row in outcomes.items()]
    return table(["trap", *tools], rows)


def main() -> None:
    """Print the scoreboard, and write it when asked to."""
    options = parser(__doc__).parse_args()
    folders, missing = installed(FOLDERS)
    swappers, missing_swappers = installed(SWAPPERS)
    parts = [
        environment(*versions()),
        *missing,
        *missing_swappers,
        "Folding:",
        board(folders, traps.FOLD, judge_fold),
        "Replacing BatchNorm by GroupNorm:",
        board(swappers, traps.SWAP, judge_swap),
    ]
    publish("scoreboard", "Models that break tools", "\n\n".join(parts), write=options.write)


if __name__ == "__main__":
    main()
