"""Whole conversions: `convert --fold` and `--bn-to-gn`, verified, on every architecture.

    python -m benchmarks.conversions                 timm, torchvision, smp; for hours, resumable
    python -m benchmarks.conversions --quick         one architecture a family
    python -m benchmarks.conversions --within 30     stop after 30 minutes
    python -m benchmarks.conversions --again         those that failed or were cut off, anew
    python -m benchmarks.conversions --summarize     its part of docs/coverage.md

Each row is one architecture with random weights, statistics and affine parameters, given to
`rewrite.convert` with an example input, its verification on, as the command line does. The outcome
is the exit code: 0 rewritten and verified, 3 nothing to rewrite, else the error. Each runs in a
process of its own with a limit of time and of memory; a row names the version that made it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewrite
from benchmarks import corpus
from benchmarks._table import environment, replace_section, table
from benchmarks.sweep.order import everything
from benchmarks.sweep.rows import Row, append, read
from benchmarks.sweep.workers import Limits, run_all

RESULTS = Path(__file__).parent / "conversions.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
PASSES = {"fold": "fold", "swap": "bn-to-gn"}
_PACKAGES = ("timm", "torchvision", "smp")
_CUT_OFF = ("timeout", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet, or write the page; return 1 if an architecture fails."""
    options = _parser().parse_args(arguments)
    rows = {row["name"]: row for row in read(options.results)}
    if options.summarize:
        PAGE.write_text(added_to(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    wanted = options.names or (_quick() if options.quick else everything(_PACKAGES))
    again = {n for n, row in rows.items() if options.again and unanswered(row, options.largest)}
    pending = [name for name in wanted if name not in rows or name in again]
    _sweep(pending, options)
    rows = {row["name"]: row for row in read(options.results)}
    failed = [line for name in wanted if name in rows for line in failures(rows[name])]
    print("\n".join(failed) or "none fails")
    return 1 if failed else 0


def measure(name: str, largest: int, version: str) -> Row:
    """Return the row of one architecture."""
    torch.set_num_threads(1)
    row: Row = {"name": name, "version": version}
    try:
        model = corpus.construct(name)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if row["parameters"] > largest:
            return row | {"status": "large"}
        corpus.fill(model)
        example_inputs = corpus.fit_inputs(name, model)
    except corpus.UnbuildableError as error:
        return row | {"status": "unbuildable", "error": str(error)[:200]}
    row["status"] = "run"
    for column, spec in PASSES.items():
        row[column] = _converted(model, spec, example_inputs)
    return row


def _converted(model: nn.Module, spec: str, example_inputs: tuple[Any, ...]) -> Row:
    """Convert once; `exit` is what the command would return."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = rewrite.convert(model, [spec], example_inputs=example_inputs)
        except rewrite.ContractError as error:
            return {"exit": 1, "error": str(error)[:300]}
        except rewrite.RewriteError as error:
            if "allocate memory" in str(error):  # the limit of this sweep, not an answer
                raise MemoryError from error
            return {"exit": 2, "error": f"{type(error).__name__}: {error}"[:300]}
        except Exception as error:  # noqa: BLE001 - a failure of ours is a row, not the end
            return {"exit": 1, "error": f"{type(error).__name__}: {error}"[:300]}
    report = result.report
    row: Row = {"exit": 0 if report.changes else 3, "changed": len(report.changes)}
    row["left"] = len(report.skips)
    row["seconds"] = round(time.process_time() - start, 1)
    verification = report.passes[0].verification
    if verification is None:
        row["unverified"] = "; ".join(report.notes)[:200]
    elif report.changes:
        row["max_rel"] = verification.max_rel
    left_out = [skip for skip in report.skips if "breaks the contract" in skip.reason]
    if left_out:
        row["left_out"] = [f"{skip.target}: {skip.reason}"[:200] for skip in left_out[:3]]
    return row


def failures(row: Row) -> list[str]:
    """Return what fails in a row, one line each; what was not run is no failure here."""
    if row["status"] in ("unbuildable", "large", *_CUT_OFF):
        return []
    if row["status"] != "run":
        return [f"{row['name']}: {row['status']}: {row['error']}"]
    return [
        f"{row['name']}: {column}: exit {row[column]['exit']}: {row[column]['error']}"
        for column in PASSES
        if row[column]["exit"] not in (0, 3)
    ]


def added_to(page: str) -> str:
    """Return docs/coverage.md with its section of whole conversions anew."""
    return replace_section(page, "conversions", summary(read(RESULTS), len(everything(_PACKAGES))))


def summary(rows: Sequence[Row], corpus_size: int) -> str:
    """Return the section of the page."""
    header = ["package", "architectures", "converted", "too large", "cut off", "not built"]
    header += [f"{column}: {what}" for column in PASSES for what in ("0", "3", "1 or 2")]
    header += ["largest difference, float64"]
    packages = sorted({row["name"].partition(":")[0] for row in rows})
    lines = [_line(package, rows) for package in [*packages, "all"]]
    failed = [line for row in rows for line in failures(row)]
    cut = [f"{row['name']} ({row['status']})" for row in rows if row["status"] in _CUT_OFF]
    versions = ", ".join(sorted({row["version"] for row in rows if "version" in row}))
    text = (
        "## Whole conversions\n\n`python -m benchmarks.conversions`: `convert --fold` and "
        "`convert --bn-to-gn` with an example input and verification on; the exit code is 0 "
        "where something was rewritten and the contract holds, 3 where nothing is there to "
        f"rewrite. {len(rows):,} of {corpus_size:,} architectures have a row, one of every family "
        f"first; rows come from the versions {versions}. {environment('timm', 'torchvision')}.\n\n"
        f"{table(header, lines)}\n\nWhat fails:\n\n"
    )
    text += "\n".join(f"- {line}" for line in failed) or "Nothing."
    if cut:
        text += f"\n\nCut off by the limit of time or memory: {', '.join(cut)}."
    return text + "\n"


def _line(package: str, rows: Sequence[Row]) -> list[object]:
    mine = [row for row in rows if package in ("all", row["name"].partition(":")[0])]
    status = Counter(row["status"] for row in mine)
    ran = [row for row in mine if row["status"] == "run"]
    cells: list[object] = [package, len(mine), status["run"], status["large"]]
    cells += [sum(status[key] for key in _CUT_OFF), status["unbuildable"]]
    for column in PASSES:
        codes = Counter(row[column]["exit"] for row in ran)
        cells += [codes[0], codes[3], codes[1] + codes[2]]
    worst = max((row["fold"].get("max_rel", 0.0) for row in ran), default=0.0)
    return [*cells, f"{worst:.1e}"]


def unanswered(row: Row, largest: int) -> bool:
    """Say whether a row was cut off, fails, or left out what is no larger than `largest`."""
    left_out = row["status"] == "large" and row["parameters"] <= largest
    return left_out or bool(failures(row)) or row["status"] in _CUT_OFF


def _sweep(pending: Sequence[str], options: argparse.Namespace) -> None:
    for package in sorted({name.partition(":")[0] for name in pending}):
        importlib.import_module(corpus.PACKAGES[package])
    limits = Limits(options.seconds, options.megabytes)
    end = time.monotonic() + 60 * options.within
    names = takewhile(lambda _: time.monotonic() < end, pending)
    function = partial(measure, largest=options.largest, version=_version())
    for row in run_all(names, function, limits, options.workers):
        append(options.results, row)
        for line in failures(row):
            print(line, flush=True)


def _version() -> str:
    """Return the commit that is checked out, or the version where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found if re.fullmatch(r"[0-9a-f]{7,}", found) else str(rewrite.__version__)


def _quick() -> list[str]:
    return [name for name in corpus.QUICK if name.partition(":")[0] in _PACKAGES]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="PACKAGE:ARCHITECTURE")
    parser.add_argument("--quick", action="store_true", help="one architecture a family")
    parser.add_argument("--again", action="store_true", help="those without an answer, too")
    parser.add_argument("--within", type=float, default=1e9, metavar="MINUTES")
    parser.add_argument("--largest", type=int, default=1_000_000_000, metavar="PARAMETERS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300, help="limit for one architecture")
    parser.add_argument("--megabytes", type=int, default=12_000, help="limit for one architecture")
    parser.add_argument("--summarize", action="store_true", help="write docs/coverage.md and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
