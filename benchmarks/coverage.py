"""The coverage sweep: every architecture of the packages here, one row each.

    python -m benchmarks.coverage --quick                     one a family, a few minutes
    python -m benchmarks.coverage                             all of them, for hours; resumable
    python -m benchmarks.coverage --package timm --package smp
    python -m benchmarks.coverage --brief                     capture and bn-to-gn alone: a third
    python -m benchmarks.coverage --peers                     the peers' columns of brief rows
    python -m benchmarks.coverage --summarize                 docs/coverage.md from the results

A row says how many batch norms run, how many capture sees, how many `bn-to-gn` leaves, whether an
activation got lost, what folding leaves and how far it is off in float64, and the same counts for
torch.fx's fuser and Opacus. Each architecture runs in a process of its own with a limit of time
and of memory. Rows are appended as JSON lines; architectures that have one are not run again,
those with a brief row only for a full one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import conversions
from benchmarks.corpus import PACKAGES, QUICK, UnbuildableError, build, installed
from benchmarks.sweep.measure import BRIEF_ABOVE, measure, with_peers
from benchmarks.sweep.order import everything
from benchmarks.sweep.rows import append, read
from benchmarks.sweep.summary import failures, summary
from benchmarks.sweep.workers import Limits, run_all

__all__ = ["QUICK", "UnbuildableError", "build"]

RESULTS = Path(__file__).parent / "coverage.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
_PRELOADED = {
    "timm": "timm",
    "torchvision": "torchvision",
    "smp": "segmentation_models_pytorch",
    "transformers": "transformers",
    "pytorchcv": "pytorchcv.model_provider",
}
"""What a package's architectures need, imported once before the forks.

Only packages of the architectures at hand: tracing patches `nn.Module`, which costs time in
proportion to the number of its subclasses.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep, or write its summary; return 1 if an architecture misses the target."""
    options = _parser().parse_args(arguments)
    if options.summarize:
        page = summary(read(options.results), len(everything(PACKAGES)))
        PAGE.write_text(conversions.added_to(page), encoding="utf-8")
        return 0
    wanted = options.names or (QUICK if options.quick else everything(options.package or PACKAGES))
    chosen = [name for name in wanted if installed(name)]
    if missing := [name for name in wanted if name not in chosen]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    rows = {row["name"]: row for row in read(options.results)}
    if options.peers:
        brief = {name: rows[name] for name in chosen if lacks_peers(rows.get(name))}
        columns = partial(_with_columns, brief)
        _sweep(list(brief), options, lambda name: with_peers(brief[name]), columns)
    else:
        pending = [name for name in chosen if _is_pending(rows.get(name), options)]
        _sweep(pending, options, partial(measure, brief=options.brief))
    rows = {row["name"]: row for row in read(options.results)}
    missed = [line for name in chosen if name in rows for line in failures(rows[name])]
    print("\n".join(missed) or f"all {len(chosen)} architectures reach the target")
    return 1 if missed else 0


def _is_pending(row: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    return row is None or (not options.brief and row.get("brief", False))


def lacks_peers(row: dict[str, Any] | None) -> bool:
    """Return whether a row is brief, of a model that was run, and without the peers' columns."""
    if row is None or row["status"] != "run" or row["parameters"] > BRIEF_ABOVE:
        return False
    return "fuse_left" not in row and "fuse_error" not in row


def _with_columns(brief: dict[str, dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """Return a completed row; a peer that ran out of time or memory takes nothing from it."""
    if row["status"] == "run":
        return row
    reason = f"{row['status']}: {row['error']}"
    return brief[row["name"]] | {"fuse_error": reason, "opacus_error": reason}


def _sweep(
    pending: Sequence[str],
    options: argparse.Namespace,
    function: Callable[[str], dict[str, Any]],
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
) -> None:
    """Measure what has no row yet, and append each row as it comes."""
    if not pending:
        return
    for package in sorted({name.partition(":")[0] for name in pending}):
        importlib.import_module(_PRELOADED[package])
    if importlib.util.find_spec("opacus") is not None:
        importlib.import_module("opacus.validators")
    limits = Limits(options.seconds, options.megabytes)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # A refreshing thread would be alive at every fork: the bar is drawn after each row instead.
    progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with progress:
        task = progress.add_task("", total=len(pending))
        for row in run_all(pending, function, limits, options.workers):
            append(options.results, finish(row))
            progress.update(task, advance=1, description=row["name"], refresh=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="PACKAGE:ARCHITECTURE")
    parser.add_argument("--quick", action="store_true", help="one architecture a family")
    parser.add_argument("--package", action="append", choices=tuple(PACKAGES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240, help="limit for one architecture")
    parser.add_argument("--megabytes", type=int, default=10_000, help="limit for one architecture")
    parser.add_argument("--brief", action="store_true", help="neither the fold nor the peers")
    parser.add_argument("--peers", action="store_true", help="complete brief rows by the peers")
    parser.add_argument("--summarize", action="store_true", help="write docs/coverage.md and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
