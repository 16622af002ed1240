"""Norms of vision transformers by two roads: traced symbolically, and observed by `torch.export`.

    traced     the forward as a graph of proxies: holds for every input of the example's rank
    observed   the exported example call: holds for the calls that were observed

    python -m benchmarks.two_roads                 timm and torchvision, one architecture a family
    python -m benchmarks.two_roads --write         and its section of docs/coverage.md
    python -m benchmarks.two_roads timm:deit3_small_patch16_224

Every family that normalizes by its input, over channels, has a row: its smallest architecture with
random weights and affine parts, captured with an example input. Each road decides about every norm
by itself; a norm that only the observed one folds is listed, with the reason of the other, and with
what `convert` does, which asks the second road where the first is unsure.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import corpus
from benchmarks._table import environment, replace_section, table
from benchmarks.sweep.order import by_family, family
from benchmarks.sweep.rows import Row, append, read
from benchmarks.sweep.workers import Limits, run_all
from passes import FoldNorm
from rewrite.errors import CaptureError
from rewrite.graph.capture import capture
from rewrite.observe.evidence import observe
from rewrite.observe.outcomes import decide
from rewrite.observe.plan import ObservedFold, Options
from rewrite.outcomes import Site, Skip
from rewrite.protocol import find_sites
from rewrite.runtime.inputs import ExampleCall, Inputs

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
PACKAGES = ("timm", "torchvision")
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def measure(name: str) -> Row:
    """Return which norms each road folds, and the first's reasons where the second folds."""
    model, inputs = corpus.build(name)
    norms = {n for n, m in model.named_modules() if isinstance(m, _NORMS)}
    start = time.process_time()
    captured = capture(model, inputs)
    sites, skips = find_sites(FoldNorm(), captured)
    traced_seconds = time.process_time() - start
    call = ExampleCall("example input", Inputs.of(inputs))
    start = time.process_time()
    row: Row = {"name": name, "norms": len(norms), "traced": len(_norms_of(sites) & norms)}
    try:
        evidence = observe(model, (call,))
    except CaptureError as error:
        return row | {"unobserved": str(error)[:200]}
    decided = list(decide(captured, evidence, Options()))
    observed_seconds = time.process_time() - start
    folds = {target for target, _, decision in decided if isinstance(decision, ObservedFold)}
    together, _ = find_sites(FoldNorm(), capture(model, inputs, (call,)))
    reasons = {_norm(skip.target): skip.reason for skip in skips}
    return row | {
        "observed": len(folds),
        "together": len(_norms_of(together) & (norms | folds)),
        "refused": {
            target: {
                "reason": reasons.get(target, "no outcome"),
                "together": target in _norms_of(together),
            }
            for target in sorted(folds - _norms_of(sites))
        },
        "seconds": [round(traced_seconds, 1), round(observed_seconds, 1)],
    }


def _norms_of(outcomes: Iterable[Site | Skip]) -> set[str]:
    return {_norm(outcome.target) for outcome in outcomes}


def _norm(target: str) -> str:
    """Return the module whose affine part a target names."""
    return target.removesuffix(".weight").removesuffix(".bias")


def architectures() -> list[str]:
    """Return the smallest architecture of each family that normalizes by its input."""
    chosen: dict[str, str] = {}
    for package in PACKAGES:
        for name in by_family(corpus.names(package)) if corpus.installed(f"{package}:") else ():
            chosen.setdefault(family(name), name)
    return [name for name in chosen.values() if _normalizes(name)]


def _normalizes(name: str) -> bool:
    """Return whether an architecture holds a norm over channels; it is built without data."""
    try:
        model = corpus.construct(name, "meta")
    except (corpus.UnbuildableError, NotImplementedError, RuntimeError):
        return True  # not built without data: its row says why, or what it holds
    return any(isinstance(module, _NORMS) for module in model.modules())


def section(rows: Sequence[Row]) -> str:
    """Return the section of docs/coverage.md."""
    done = [row for row in rows if "observed" in row and row["norms"]]
    rest = [row for row in rows if "observed" not in row and row.get("norms", 1)]
    refused = [(row["name"], *item) for row in done for item in row["refused"].items()]
    alone = [item for item in refused if not item[2]["together"]]
    header = ("architecture", "norms", "traced", "observed", "both", "only observed")
    body = [
        (r["name"], r["norms"], r["traced"], r["observed"], r["together"], len(r["refused"]))
        for r in done
    ]
    lines = [
        "## Norms by two roads",
        "",
        "`python -m benchmarks.two_roads`: one architecture of every family of timm and "
        "torchvision that normalizes by its input, random weights and affine parts, an example "
        "input. How many of its LayerNorms and RMSNorms fold where the forward is traced, where "
        "the example call is observed, and in `convert`, which uses both; and how many only the "
        "second folds.",
        "",
        f"{len(done)} architectures, {sum(r['norms'] for r in done)} norms: traced "
        f"{sum(r['traced'] for r in done)}, observed {sum(r['observed'] for r in done)}, both "
        f"{sum(r['together'] for r in done)}; {len(refused)} are refused by the first road and "
        f"folded by the second, {len(alone)} of them by `convert` as well. "
        f"{environment(*PACKAGES)}.",
        "",
        table(header, body),
        "",
        *(
            f"- {name} {target}: {held['reason']}"
            + ("" if held["together"] else " (refused by `convert`, too)")
            for name, target, held in refused
        ),
        *(f"- {row['name']}: {row.get('unobserved') or row.get('error')}" for row in rest),
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure what has no row yet; return 1 where `convert` leaves what the second road folds."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("names", nargs="*", metavar="PACKAGE:ARCHITECTURE")
    arguments.add_argument("--results", type=Path, default=Path("two_roads.jsonl"))
    arguments.add_argument("--write", action="store_true", help="write docs/coverage.md")
    arguments.add_argument("--seconds", type=float, default=240, help="limit for one architecture")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = {row["name"] for row in read(given.results)}
    wanted = [name for name in given.names or architectures() if given.names or name not in done]
    for row in run_all(wanted, measure, Limits(given.seconds, 12_000), workers=1):
        append(given.results, row)
        counts = {key: row[key] for key in ("traced", "observed", "together") if key in row}
        print(row["name"], row.get("norms"), counts, row.get("seconds"), flush=True)
        for target, held in row.get("refused", {}).items():
            mark = "" if held["together"] else "REFUSED "
            print(f"    {mark}{target}: {held['reason']}", flush=True)
    rows = read(given.results)
    text = section(rows)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replace_section(page, "two-roads", text), encoding="utf-8")
    print(text, file=sys.stderr)
    left = [held for row in rows for held in row.get("refused", {}).values()]
    return int(any(not held["together"] for held in left))


if __name__ == "__main__":
    sys.exit(main())
