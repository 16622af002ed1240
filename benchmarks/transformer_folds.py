"""Which norms of transformers fold, family by family, and whether the result is right.

    error = max |f64(x) - g64(x)| / max |f64(x)|     over every call: prefill, mask, cache step

A family is one model type of transformers, made tiny with random weights, every 1-D parameter drawn
anew, decoders tied and untied. Foldable are the norms that a list by hand names for each family
(`transformer_families`); the rest is declined with a reason. Norms and experts that compute in
float32 on purpose are judged widened, the experts by their plain implementation.

A row is a process of its own with a limit of time and memory: what one family does, no other row
notices. It tells by which version of the code it was made. A run takes up where another stopped: it
makes the rows that this version has not made yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._table import environment, table, write_section
from benchmarks.sweep.rows import Row, append
from benchmarks.sweep.workers import Limits, run_all
from benchmarks.transformer_families import Family, families, foldable, made
from passes import FoldNorm
from rewrite.equivalence.compare import compare
from rewrite.equivalence.generation import generates, greedy_tokens
from rewrite.errors import RewriteError
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.observe.calls import default_calls
from rewrite.observe.evidence import observe
from rewrite.protocol import find_sites
from rewrite.runtime.copying import copy_model
from rewrite.runtime.float64 import in_float64
from rewrite.runtime.inputs import ExampleCall, call
from rewrite.runtime.modes import isolated, widen

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
WRONG = 1e-10


def version() -> str:
    """Return a digest of the code that a row rests on."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("rewrite", "passes", "benchmarks/transformer_families"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def measure(family: Family, *, tied: bool) -> dict[str, Any]:
    """Fold one model and return what became of its norms, and the largest error."""
    model = made(family, tied=tied)
    calls = default_calls(model)
    if not calls:
        return {"failed": "the model refuses every call"}
    start = time.perf_counter()
    try:
        evidence = observe(model, calls)
    except RewriteError as error:
        return {"failed": str(error)}
    observed = time.perf_counter() - start
    wide = copy_model(model).double()  # folded in float64: what rounds is not what is judged
    captured = capture(copy_model(wide), calls[0].inputs.map(widen), calls)
    captured.observed = evidence
    declined = _declined(captured) if tied else {}
    fold = FoldNorm(untie=True)
    sites, skips = find_sites(fold, captured)
    changes = fold.rewrite_all(captured, sites)
    captured.editor.commit()
    seconds = time.perf_counter() - start
    errors = judge(wide, captured.model, calls)
    left = {s.target: s.reason for s in skips if not s.target.endswith((".weight", ".bias"))}
    folded = [c.target for c in changes]
    named = foldable(family, model)
    return {
        "folded": folded,
        "left": left,
        "missed": [name for name in named if name not in folded],
        "beyond": [name for name in folded if name not in named],
        "tied_declined": declined,
        "errors": errors,
        "failed_calls": list(evidence.failed),
        "seconds": [round(observed, 2), round(seconds, 2)],
    }


def _declined(captured: Captured) -> dict[str, str]:
    """Return what a fold says of a norm whose reader shares its weight, without `untie`."""
    _, skips = find_sites(FoldNorm(), captured)
    return {skip.target: skip.reason for skip in skips if "untie" in skip.reason}


def judge(a: nn.Module, b: nn.Module, calls: tuple[ExampleCall, ...]) -> dict[str, float]:
    """Return the largest relative error of each call in float64; 1 where tokens differ."""
    errors: dict[str, float] = {}
    with in_float64(a, b), isolated(a), isolated(b):
        for each in calls:
            wide = each.inputs.map(widen)
            compared = compare(call(a, wide.clone()), call(b, wide.clone()))
            errors[each.name] = 1.0 if compared.reasons else compared.max_rel
        first = calls[0].inputs.map(widen)
        if generates(a, first):
            same = greedy_tokens(a, first) == greedy_tokens(b, first)
            errors["16 greedy tokens"] = 0.0 if same else 1.0
    return errors


def run(names: list[str], out: Path, limits: Limits, *, tied_too: bool = True) -> None:
    """Measure families that `out` does not hold yet, one line of JSON each."""
    code = version()
    done = {(r["family"], r["tied"]) for r in rows_of(out) if r["version"] == code}
    wanted = [family for family in families() if not names or family.name in names]
    own, shared = [(f, False) for f in wanted], [(f, True) for f in wanted if f.ties and tied_too]
    pending = {_key_of({"family": f.name, "tied": tied}): (f, tied) for f, tied in (*own, *shared)}
    pending = {key: (f, t) for key, (f, t) in pending.items() if (f.name, t) not in done}

    def work(key: str) -> Row:
        family, tied = pending[key]
        return {"name": key, **measure(family, tied=tied)}

    for row in run_all(pending, work, limits, workers=1):
        family, tied = pending[row.pop("name")]
        if (status := row.pop("status", None)) is not None:
            row = {"failed": f"{_STATUS.get(status, status)}: {row['error']}"}
        row |= {"family": family.name, "tied": tied, "kind": family.kind, "version": code}
        append(out, row)
        print(summary(row), flush=True)


_STATUS = {"timeout": "out of time", "memory": "out of memory", "failed": "raised"}
"""What became of a process that returned no row."""


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, the last of each family and head, in the order of families."""
    if not out.exists():
        return []
    held = {(r["family"], r["tied"]): r for r in map(json.loads, out.read_text().splitlines())}
    order = {family.name: number for number, family in enumerate(families())}
    return sorted(held.values(), key=lambda r: (r["tied"], order.get(r["family"], len(order))))


def summary(row: dict[str, Any]) -> str:
    """Return one line of progress."""
    name = _key_of(row)
    if "folded" not in row:
        return f"{name}: {row['failed']}"
    worst = max(row["errors"].values(), default=0.0)
    return (
        f"{name}: {len(row['folded'])} folded, {len(row['left'])} left, missed {row['missed']}, "
        f"beyond {row['beyond']}, "
        f"error {worst:.1e}, {row['seconds']} {row['failed_calls'] or ''}"
    )


def section(rows: list[dict[str, Any]]) -> str:
    """Return the table of all families, and the numbers above it."""
    right = [row for row in rows if "folded" in row]
    wrong = [r for r in right if max(r["errors"].values(), default=0.0) > WRONG]
    lost = sum(len(row["missed"]) for row in right)
    listed = lost + sum(len(row["folded"]) - len(row["beyond"]) for row in right)
    kinds = Counter(kind for _, kind in {(row["family"], row["kind"]) for row in right})
    versions = Counter(row["version"] for row in rows)
    tied = [row for row in right if row["tied"]]
    failed = [_key_of(row) for row in rows if "folded" not in row]
    said = sum(bool(row["tied_declined"]) for row in tied)
    lines = [
        f"{', '.join(f'{n} {kind} families' for kind, n in sorted(kinds.items()))}, "
        f"{len(tied)} tied as well (the norm before the head declined in {said} of them "
        f"without `untie`); {len(wrong)} wrong at {WRONG:.0e}; of {listed} norms that the list by "
        f"hand names {listed - lost} folded ({100 * (listed - lost) / max(1, listed):.1f} %).",
        f"Rows without a result: {', '.join(failed) or 'none'}.",
        "Version of the code, and rows by it: "
        f"{', '.join(f'{name} ({count})' for name, count in versions.items())}.",
        environment("transformers"),
        "",
    ]
    body = [_row(row) for row in rows]
    header = (
        "family", "head", "folded", "left", "listed, left", "beyond the list", "largest error",
        "left because",
    )  # fmt: skip
    return "\n".join(lines) + "\n" + table(header, body)


def _key_of(row: dict[str, Any]) -> str:
    return f"{row['family']}{' tied' if row['tied'] else ''}"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    head = "untied" if row["tied"] else "own"
    if "folded" not in row:
        return row["family"], head, *"-----", row["failed"].replace("|", "/")[:200]
    reasons = Counter(_short(reason) for reason in row["left"].values())
    why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    worst = max(row["errors"].values(), default=0.0)
    counts = (str(len(row[key])) for key in ("folded", "left", "missed", "beyond"))
    return row["family"], head, *counts, f"{worst:.0e}", why


def _short(reason: str) -> str:
    # Brackets are links in Markdown: `['hidden_states'][0]` would be one that leads nowhere.
    text = re.sub(r" in [\w.]+ \([^)]*\)|\d+\.", "", reason).replace("|", "/")[:80]
    return text.replace("[", r"\[")


def main() -> None:
    """Run, and with `--write` put the table into docs/transformers.md."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("families", nargs="*", help="only these")
    arguments.add_argument("--out", type=Path, default=Path("transformer_folds.jsonl"))
    arguments.add_argument("--no-tied", action="store_true", help="leave tied heads out")
    arguments.add_argument("--write", action="store_true", help="write docs/transformers.md")
    arguments.add_argument("--seconds", type=float, default=300.0, help="a row's limit of time")
    arguments.add_argument("--megabytes", type=int, default=8_000, help="a row's limit of memory")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    unknown = set(given.families) - {family.name for family in families()}
    if unknown:
        arguments.error(f"no such family: {', '.join(sorted(unknown))}")
    limits = Limits(given.seconds, given.megabytes)
    run(given.families, given.out, limits, tied_too=not given.no_tied)
    text = section(rows_of(given.out))
    print(text, file=sys.stderr)
    if given.write:
        write_section(PAGE, "transformer-folds", text)


if __name__ == "__main__":
    main()
