"""Private training after a swap: which architectures Opacus takes, and trains for a step.

    python -m benchmarks.private_training [--draw 60] [--workers 1] [--summarize --write]

Per architecture with a BatchNorm: `make_private` and one step of DP-SGD after `--bn-to-gn` alone,
after `--bn-to-gn --out-of-place`, and after Opacus' own `ModuleValidator.fix`. Architectures: the
quick tier of the sweep, and a draw from all of it with a fixed seed. Weights are random. Rows are
appended to private_training.jsonl; what has one is not run again.
"""

from __future__ import annotations

import json
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewrite
from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import QUICK, build, installed
from benchmarks.sweep.peers import opacus_fix
from benchmarks.sweep.workers import Limits, run_all
from rewrite.runtime.copying import copy_model
from rewrite.runtime.leaves import tensors

RESULTS = Path(__file__).parent / "private_training.jsonl"
SWEEP = Path(__file__).parent / "coverage.jsonl"
WAYS = ("bn-to-gn", "bn-to-gn, out-of-place", "Opacus' fix")
_SEED = 19


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no row yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--draw", type=int, default=60, help="architectures beside the quick tier")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--summarize", action="store_true", help="run nothing")
    chosen = options.parse_args(arguments)
    wanted = [name for name in QUICK if installed(name)]
    wanted += draw(chosen.draw, exclude=wanted)
    if not chosen.summarize:
        done = {row["name"] for row in read()}
        pending = [name for name in wanted if name not in done]
        for row in run_all(pending, measure, Limits(150, 12_000), chosen.workers):
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(row, flush=True)
    publish(
        "private-training", "Private training after a swap", summary(read()), write=chosen.write
    )


def draw(count: int, exclude: Sequence[str]) -> list[str]:
    """Return `count` architectures of the sweep that have a BatchNorm, the same at every call."""
    rows = map(json.loads, SWEEP.read_text(encoding="utf-8").splitlines())
    rest = sorted(
        {row["name"] for row in rows if row.get("norms") and row["parameters"] < 60_000_000}
        - set(exclude)
    )
    rest = [name for name in rest if installed(name)]
    return random.Random(_SEED).sample(rest, min(count, len(rest)))


def read() -> list[dict[str, Any]]:
    """Return the rows so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def measure(name: str) -> dict[str, Any]:
    """Return the row of one architecture: per way "ok" or what stopped it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, inputs = build(name)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return {"name": name, "status": "no BatchNorm"}
    passes = ["bn-to-gn", "out-of-place"]

    def ours(count: int) -> nn.Module:
        return rewrite.convert(model, passes[:count], example_inputs=inputs, verify=False).model

    makes: list[Callable[[], nn.Module]] = [
        lambda: ours(1), lambda: ours(2), lambda: opacus_fix(copy_model(model)),
    ]  # fmt: skip
    found = [_outcome(make, inputs) for make in makes]
    return {"name": name, "status": "done"} | dict(zip(WAYS, found, strict=True))


def _outcome(make: Callable[[], nn.Module], inputs: tuple[Any, ...]) -> str:
    try:
        return step(make(), inputs)
    except Exception as error:  # noqa: BLE001 - the row says what stopped it
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def step(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Make a model private, take one step of DP-SGD, and return "ok"; or raise."""
    from opacus import PrivacyEngine

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.zeros(8, 1)), batch_size=2
    )
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(trained, lr=0.01), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    outputs = [t for t in tensors(private(*inputs)) if t.requires_grad]
    torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    optimizer.step()
    return "ok"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the counts, and what stopped the others."""
    ran = [row for row in rows if row.get("status") == "done"]
    other = Counter(row["status"] for row in rows if row["status"] not in ("done", "no BatchNorm"))
    counts = {way: sum(row[way] == "ok" for row in ran) for way in WAYS}
    kinds = {way: Counter(_kind(row[way]) for row in ran if row[way] != "ok") for way in WAYS}
    reasons = sorted(set().union(*kinds.values()), key=lambda kind: -kinds[WAYS[1]][kind])
    lines: list[list[object]] = [
        ["trained for a step", *(f"{counts[way]} of {len(ran)}" for way in WAYS)]
    ]
    lines += [[kind, *(kinds[way][kind] for way in WAYS)] for kind in reasons]
    left = ", ".join(f"{n} {status}" for status, n in other.items()) or "none"
    stopped = [row for row in ran if row[WAYS[1]] != "ok"]
    names_ = ", ".join(f"{row['name']} ({_kind(row[WAYS[1]])})" for row in stopped) or "none"
    return (
        f"{environment('opacus', 'timm')}. {len(ran)} architectures with a BatchNorm, in the order "
        f"of the quick tier and then of the draw; ended otherwise: {left}."
        f"\n\n{table(['', *WAYS], lines)}\n\nLeft after "
        f"`--bn-to-gn --out-of-place`: {names_}."
    )


def _kind(text: str) -> str:
    known = {
        "modified inplace": "a view is modified in place",
        "with buffers": "Opacus: a trainable layer with buffers",
        "targets should not be none": "a detector: its loss needs boxes",
        "stack expects": "Opacus: no per-sample gradient of a bare parameter",
        "IllegalModuleConfiguration": "Opacus: a layer that it does not know",
        "UnsupportedModuleError": "Opacus: a layer that it does not know",
    }
    return next((kind for part, kind in known.items() if part in text), text.split(":")[0])


if __name__ == "__main__":
    main()
