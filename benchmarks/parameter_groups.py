"""Weight decay by structure and by name: which parameters each puts into the wrong group.

    python -m benchmarks.parameter_groups [--within MINUTES] [--limit 150] [--workers 1] [--write]
    python -m benchmarks.parameter_groups --summarize --write     # the rows so far; runs nothing

Right is, by the class of the module that holds it: the matrix of a layer (`nn.Linear`,
convolutions, recurrent layers, attention) decays, parameters of norms and biases do not. Bare
parameters of other modules, which no class speaks for, are counted beside, and those that decay
are named by class. The usual rule by name: no decay for what is one-dimensional or whose name
contains "bias" or "norm".

All architectures of the sweep, those with fewer parameters first. Neither rule reads a weight, so a
model is built on the device meta, or, where its constructor asks for a value, with weights that are
left as memory was found. Rows are appended to parameter_groups.jsonl: what has one
is not run again, so a run that was stopped goes on; an architecture that fails is a row.
"""

from __future__ import annotations

import importlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import UnbuildableError, construct, installed
from benchmarks.sweep.rows import append, read
from benchmarks.sweep.workers import Limits, run_all
from rewrite.training import parameter_groups

RESULTS = Path(__file__).parent / "parameter_groups.jsonl"
SWEEP = Path(__file__).parent / "coverage.jsonl"
COLUMNS = ("judged", "wrong", "wrong_by_name", "bare", "bare_by_name")
_SHOWN = 25
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no row yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--within", type=float, default=1e9, metavar="MINUTES")
    options.add_argument("--limit", type=int, default=150, help="seconds for one architecture")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--summarize", action="store_true", help="run nothing")
    options.add_argument("names", nargs="*", metavar="PACKAGE:ARCHITECTURE")
    chosen = options.parse_args(arguments)
    if not chosen.summarize:
        done = {row["name"] for row in read(chosen.results)}
        pending = [name for name in chosen.names or architectures() if name not in done]
        for package in {name.partition(":")[0] for name in pending}:
            importlib.import_module(f"benchmarks.corpus.{package}_source")  # once, before the forks
        end = time.monotonic() + 60 * chosen.within
        names = takewhile(lambda _: time.monotonic() < end, pending)
        for row in run_all(names, measure, Limits(chosen.limit, 12_000), chosen.workers):
            append(chosen.results, row)
            print(row, flush=True)
    title = "Weight decay by structure"
    publish("parameter-groups", title, summary(read(chosen.results)), write=chosen.write)


def architectures() -> list[str]:
    """Return the architectures of the sweep whose package is here, the smallest first."""
    sizes = {row["name"]: row["parameters"] for row in read(SWEEP) if "parameters" in row}
    return sorted(filter(installed, sizes), key=lambda name: (sizes[name], name))


def measure(name: str) -> dict[str, Any]:
    """Return the row of one architecture: the counts, and what is counted by class and key."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        model, device = construct(name, "meta"), "meta"
    except UnbuildableError:
        model, device = construct(name), "cpu"
    judged, kinds = count(model)
    counts = [judged, *(found.total() for found in kinds.values())]
    named = {column: dict(found) for column, found in kinds.items() if found}
    return {"name": name, "status": "done", "device": device, "counts": counts, "kinds": named}


def count(model: nn.Module) -> tuple[int, dict[str, Counter[str]]]:
    """Return how many parameters are judged, and by class and key what the other `COLUMNS` count.

    These are the wrong ones here and by name, and the bare ones that decay. A parameter that two
    modules share is counted in both.
    """
    judged = 0
    kinds: dict[str, Counter[str]] = {column: Counter() for column in COLUMNS[1:]}
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.1)[0]["params"]}
    for name, module in model.named_modules():
        for full, parameter in module.named_parameters(name, recurse=False):
            if not parameter.requires_grad:
                continue
            key = full.rpartition(".")[2]
            by_name = parameter.dim() > 1 and not any(w in full.lower() for w in ("bias", "norm"))
            wanted = right(module, key)
            if wanted is None:
                found = {"bare": id(parameter) in decayed, "bare_by_name": by_name}
            else:
                judged += 1
                found = {
                    "wrong": (id(parameter) in decayed) != wanted,
                    "wrong_by_name": by_name != wanted,
                }
            for column in (column for column, is_so in found.items() if is_so):
                kinds[column][f"{type(module).__name__}.{key}"] += 1
    return judged, kinds


def right(module: nn.Module, key: str) -> bool | None:
    """Return whether a parameter has to decay, by the class of its module; None: no class says."""
    if isinstance(module, _LAYERS):
        return "weight" in key
    kinds = [kind.__name__ for kind in type(module).__mro__]
    return False if any(norm in kind for kind in kinds for norm in _NORMS) else None


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the body of the section: a row a package, what differs by class, what has no count."""
    done = [row for row in rows if row["status"] == "done"]
    packages = dict.fromkeys(row["name"].partition(":")[0] for row in done)
    chosen = {p: [r for r in done if r["name"].startswith(f"{p}:")] for p in sorted(packages)}
    header = ["architectures", "", "with one wrong here", "by name"]
    header += ["judged by class", "wrong here", "wrong by name"]
    header += ["bare, decayed here", "bare, decayed by name"]
    body = [_totals("all", done), *(_totals(p, of_it) for p, of_it in chosen.items())]
    without = [row for row in rows if row["status"] != "done"]
    reasons = Counter(f"{row['status']} ({_reason(row)})" for row in without)
    return (
        f"{environment('timm', 'transformers')}. Of {len(architectures())} architectures that the "
        f"sweep could build, {len(rows)} have a row, smallest first; without a count: "
        f"{', '.join(f'{n} {reason}' for reason, n in reasons.most_common()) or 'none'}.\n\n"
        f"{table(header, body)}\n\n"
        + "\n\n".join(f"{title}: {_named(done, column)}." for column, title in _TITLES.items())
    )


_TITLES = {
    "wrong": "Wrong here",
    "wrong_by_name": "Wrong by name, by class and key",
    "bare": "Bare parameters that decay here",
    "bare_by_name": "Bare parameters that decay by name",
}


def _totals(title: str, rows: Sequence[dict[str, Any]]) -> list[object]:
    counts = [dict(zip(COLUMNS, row["counts"], strict=True)) for row in rows]
    having = [sum(found[column] > 0 for found in counts) for column in ("wrong", "wrong_by_name")]
    return [title, len(rows), *having, *(sum(found[c] for found in counts) for c in COLUMNS)]


def _named(rows: Sequence[dict[str, Any]], column: str) -> str:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["kinds"].get(column, {}))
    shown = [f"`{kind}` ({n})" for kind, n in total.most_common(_SHOWN)]
    more = [f"{len(total) - _SHOWN} more classes"] if len(total) > _SHOWN else []
    return ", ".join([*shown, *more]) or "none"


def _reason(row: dict[str, Any]) -> str:
    return str(row.get("error", "")).partition(":")[0] or "no reason"


if __name__ == "__main__":
    main()
