"""Which norms of transformers fold, family by family, and whether the result is right.

    error = max |f64(x) - g64(x)| / max |f64(x)|     over every call: prefill, mask, cache step

A family is one model type of transformers, made tiny with random weights, every 1-D parameter drawn
anew, tied and untied. `foldable` is what the table of names below calls foldable; the rest is
declined with a reason. Norms and experts that compute in float32 on purpose are judged widened, the
experts by their plain implementation.
"""

from __future__ import annotations

import argparse
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

from benchmarks._table import environment, replace_section, table
from benchmarks.transformer_families import families, made
from passes import FoldNorm
from rewrite.equivalence.compare import compare
from rewrite.equivalence.generation import generates, greedy_tokens
from rewrite.errors import RewriteError
from rewrite.graph.capture import capture
from rewrite.observe.calls import default_calls
from rewrite.observe.evidence import observe
from rewrite.protocol import find_sites
from rewrite.runtime.copying import copy_model
from rewrite.runtime.float64 import in_float64
from rewrite.runtime.inputs import ExampleCall, call
from rewrite.runtime.modes import isolated, widen

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
WRONG = 1e-10

_STAYS = re.compile(
    r"(^|\.)(q_norm|k_norm|q_layernorm|k_layernorm|query_layernorm|key_layernorm|q_layer_norm|"
    r"k_layer_norm|post_self_attn_layernorm|post_mlp_layernorm|post_feedforward_layernorm|"
    r"query_norm|key_norm|kv_a_layernorm)$"
)
"""Norms that no fold reaches: of queries and keys before a rotation, behind a block, in a cache."""


def missed(row: dict[str, Any]) -> list[str]:
    """Return the norms that stayed although the list of names calls them foldable."""
    kept = next((f.kept for f in families() if f.name == row["family"]), frozenset())
    return [
        target
        for target, reason in row["left"].items()
        if not _STAYS.search(target)
        and not target.endswith("_bias")  # a constant that is added, and no norm
        and "no affine part" not in reason
        and not any(re.sub(r"\.\d+", "", target).endswith(name) for name in kept)
    ]


def measure(family: str, model: nn.Module, *, tied: bool) -> dict[str, Any]:
    """Fold one model and return what became of its norms, and the largest error."""
    calls = default_calls(model)
    if not calls:
        return {"family": family, "tied": tied, "failed": "the model refuses every call"}
    start = time.perf_counter()
    try:
        evidence = observe(model, calls)
    except RewriteError as error:
        return {"family": family, "tied": tied, "failed": str(error)}
    observed = time.perf_counter() - start
    wide = copy_model(model).double()  # folded in float64: what rounds is not what is judged
    captured = capture(copy_model(wide), calls[0].inputs.map(widen), calls)
    captured.observed = evidence
    fold = FoldNorm(untie=True)
    sites, skips = find_sites(fold, captured)
    changes = fold.rewrite_all(captured, sites)
    captured.editor.commit()
    seconds = time.perf_counter() - start
    errors = judge(wide, captured.model, calls)
    left = {s.target: s.reason for s in skips if not s.target.endswith((".weight", ".bias"))}
    return {
        "family": family,
        "tied": tied,
        "folded": [c.target for c in changes],
        "left": left,
        "errors": errors,
        "failed_calls": list(evidence.failed),
        "seconds": [round(observed, 2), round(seconds, 2)],
    }


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


def run(names: list[str], out: Path) -> None:
    """Measure families that `out` does not hold yet, one line of JSON each."""
    done = set()
    if out.exists():
        done = {(r["family"], r["tied"]) for r in map(json.loads, out.read_text().splitlines())}
    wanted = [family for family in families() if not names or family.name in names]
    own, shared = [(f, False) for f in wanted], [(f, True) for f in wanted if f.ties]
    for family, tied in (*own, *shared):
        if (family.name, tied) in done:
            continue
        try:
            model = made(family, tied=tied)
            row = measure(family.name, model, tied=tied)
        except Exception as error:  # noqa: BLE001 - one family is one row, whatever it raises
            row = {"family": family.name, "tied": tied, "crashed": repr(error)[:300]}
        row["kind"] = family.kind
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(summary(row), flush=True)


def summary(row: dict[str, Any]) -> str:
    """Return one line of progress."""
    name = f"{row['family']}{' tied' if row['tied'] else ''}"
    if "folded" not in row:
        return f"{name}: {row.get('failed') or row.get('crashed')}"
    worst = max(row["errors"].values(), default=0.0)
    return (
        f"{name}: {len(row['folded'])} folded, {len(row['left'])} left, missed {missed(row)}, "
        f"error {worst:.1e}, {row['seconds']} {row['failed_calls'] or ''}"
    )


def section(rows: list[dict[str, Any]]) -> str:
    """Return the table of all families, and the numbers above it."""
    right = [row for row in rows if "folded" in row]
    wrong = [r for r in right if max(r["errors"].values(), default=0.0) > WRONG]
    folded = sum(len(row["folded"]) for row in right)
    lost = sum(len(missed(row)) for row in right)
    kinds = Counter(kind for _, kind in {(row["family"], row["kind"]) for row in right})
    lines = [
        f"{', '.join(f'{n} {kind} families' for kind, n in sorted(kinds.items()))}; "
        f"{len(wrong)} wrong at {WRONG:.0e}; {folded} of {folded + lost} foldable norms folded "
        f"({100 * folded / max(1, folded + lost):.1f} %).",
        environment("transformers"),
        "",
    ]
    body = [_row(row) for row in rows]
    header = ("family", "head", "folded", "left", "foldable, left", "largest error", "left because")
    return "\n".join(lines) + "\n" + table(header, body)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    head = "untied" if row["tied"] else "own"
    if "folded" not in row:
        return row["family"], head, "-", "-", "-", "-", row.get("failed") or row.get("crashed", "")
    reasons = Counter(_short(reason) for reason in row["left"].values())
    why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    worst = max(row["errors"].values(), default=0.0)
    counts = (str(len(held)) for held in (row["folded"], row["left"], missed(row)))
    return row["family"], head, *counts, f"{worst:.0e}", why


def _short(reason: str) -> str:
    return re.sub(r" in [\w.]+ \([^)]*\)|\d+\.", "", reason).replace("|", "/")[:80]


def main() -> None:
    """Run, and with `--write` put the table into docs/transformers.md."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("families", nargs="*", help="only these")
    arguments.add_argument("--out", type=Path, default=Path("transformer_folds.jsonl"))
    arguments.add_argument("--write", action="store_true", help="write docs/transformers.md")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(given.families, given.out)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()]
    text = section(rows)
    print(text, file=sys.stderr)
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replace_section(page, "transformer-folds", text), encoding="utf-8")


if __name__ == "__main__":
    main()
