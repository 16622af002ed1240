"""From rows to the page: what was reached, what was not, and why."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks._table import environment, table
from benchmarks.sweep.rows import Row

_QUALIFIED = re.compile(r"\b\w+(\.[\w\[\]']+)+|\b\w+_\d+\b")

_INTRODUCTION = """# Coverage

Every architecture that timm, torchvision, segmentation-models-pytorch, transformers and pytorchcv
build offline, with random weights, random BatchNorm statistics and a random affine map.
`python -m benchmarks.coverage` makes the rows (resumable, hours), `--summarize` makes this page,
`--quick` runs one architecture a family.

Norms are counted by running the model: a batch norm that runs is one running mean that a call of
`batch_norm` was given. *Seen* is how many of those capture names; *left* is how many still run
after `bn-to-gn`. *Peers* are counted the same way: batch norms that still run after
`torch.fx.experimental.optimization.fuse` and after Opacus' `ModuleValidator.fix`, over the
architectures that they were given and on which they do not raise.

Models of more than 300 million parameters are not folded and not given to the peers; those of more
than a billion are rewritten on the meta device and not run. `--brief` leaves the fold and the peers
out, `--peers` adds the peers to brief rows: the tables say over how many architectures they are.
"""


def failures(row: Row) -> list[str]:
    """Return where a row misses the target, one line each; empty for a good row."""
    name, status = row["name"], row["status"]
    if status in ("unbuildable", "no-norm"):
        return []
    if status in ("timeout", "memory", "crashed", "failed"):
        return [f"{name}: {status}: {row['error']}"]
    if status == "structure":
        left = row["left_in_modules"]
        reasons = "; ".join(row["skips"])
        return [f"{name}: {left} norms left (not run): {reasons}"] if left else []
    lines = []
    if row["seen"] < row["run"]:
        lines.append(f"{row['run'] - row['seen']} norms that run not seen: {row['unseen'][:3]}")
    if "swap_error" in row:
        lines.append(f"bn-to-gn: {row['swap_error']}")
    else:
        if row["left"]:
            lines.append(f"{row['left']} of {row['run']} norms left: {'; '.join(row['skips'])}")
        if row["activations_after"] != row["activations"]:
            lines.append(f"activations {row['activations']} -> {row['activations_after']}")
        if row["finite_before"] and not row["finite"]:
            lines.append("the output is not finite")
        if not row["same_shape"]:
            lines.append("the output has another shape")
    if _is_off(row):
        lines.append(f"folding is off by {row['fold_diff']:.1e} in float64")
    if "fold_error" in row and not row["fold_error"].startswith("the model itself"):
        lines.append(f"fold: {row['fold_error']}")
    return [f"{name}: {line}" for line in lines]


def _is_off(row: Row) -> bool:
    """Return whether folding moved the output further than rounding does in that model."""
    return bool(row.get("fold_diff", 0) > max(1e-9, 100 * row.get("rounding", 0)))


def summary(rows: Sequence[Row], corpus_size: int) -> str:
    """Return the page; `corpus_size` is how many architectures there are to run."""
    packages = sorted({package(row) for row in rows})
    ran = [row for row in rows if row["status"] == "run"]
    parts = [
        _INTRODUCTION,
        f"{len(rows):,} of {corpus_size:,} architectures have a row so far, in the sweep's order: "
        "one of every family first, large variants last; `python -m benchmarks.coverage` goes on. "
        f"{environment(*_versions())}.\n",
        "## Norms\n",
        table(_NORMS, [_norms(name, rows) for name in [*packages, "all"]]),
        "\n## Peers\n",
        table(_PEERS, [_peers(name, rows) for name in [*packages, "all"]]),
        "\n## Folding\n",
        table(_FOLDS, [_folds(name, rows) for name in [*packages, "all"]]),
        "\nNorms that are left, by reason:\n",
        _fold_reasons(ran),
        "\n## Time of capture\n",
        _times(ran) if ran else "Nothing ran.",
        "\n## What misses the target\n",
        _bullets(line for row in rows for line in failures(row)),
        "\n## What the package cannot build here, or what got no fitting input from the sweep\n",
        _grouped(rows, "unbuildable"),
        "\n## Norms that compute without batch_norm\n",
        _arithmetic(ran),
        "\n## Forwards that cannot be traced, most common reasons\n",
        _opaque(rows),
    ]
    return "\n".join(parts) + "\n"


def _versions() -> list[str]:
    """Return the distributions among those of the corpus that are installed here."""
    known = ("timm", "torchvision", "segmentation_models_pytorch", "transformers", "pytorchcv")
    return [name for name in (*known, "opacus") if importlib.util.find_spec(name) is not None]


def package(row: Row) -> str:
    """Return the package of a row's architecture."""
    return str(row["name"].partition(":")[0])


_NORMS = (
    "package", "architectures", "run", "no norm", "structure only", "not built or run", "failed",
    "norms that run", "seen", "left by bn-to-gn", "complete", "activations lost",
)  # fmt: skip


def _norms(name: str, rows: Sequence[Row]) -> list[object]:
    mine = [row for row in rows if name in ("all", package(row))]
    status = Counter(row["status"] for row in mine)
    ran = [row for row in mine if row["status"] == "run"]
    broken = sum(status[key] for key in ("timeout", "memory", "crashed", "failed"))
    complete = sum(row["seen"] == row["run"] and row.get("left") == 0 for row in ran)
    lost = sum(row.get("activations_after", 0) < row["activations"] for row in ran if "left" in row)
    return [
        name, len(mine), status["run"], status["no-norm"], status["structure"],
        status["unbuildable"], broken, _sum(ran, "run"), _sum(ran, "seen"), _sum(ran, "left"),
        f"{complete} of {len(ran)}", lost,
    ]  # fmt: skip


_PEERS = (
    "package", "architectures", "torch.fx fuse: left", "fails on", "off by > 1e-2",
    "Opacus: left", "fails on", "bn-to-gn: left", "fails on",
)  # fmt: skip


def _peers(name: str, rows: Sequence[Row]) -> list[object]:
    mine = [row for row in rows if row["status"] == "run" and name in ("all", package(row))]
    ran = [row for row in mine if "fuse_left" in row or "fuse_error" in row]
    return [
        name,
        len(ran),
        _of(ran, "fuse_left"),
        sum("fuse_error" in row for row in ran),
        sum(row.get("fuse_diff", 0) > 1e-2 for row in ran),
        _of(ran, "opacus_left"),
        sum("opacus_error" in row for row in ran),
        _of(ran, "left"),
        sum("swap_error" in row for row in ran),
    ]


_FOLDS = (
    "package", "architectures", "norms that run", "left by fold", "largest difference, float64",
    "off beyond rounding", "fails on", "model not float64",
)  # fmt: skip


def _folds(name: str, rows: Sequence[Row]) -> list[object]:
    mine = [row for row in rows if row["status"] == "run" and name in ("all", package(row))]
    folded = [row for row in mine if "fold_diff" in row]
    errors = [row["fold_error"] for row in mine if "fold_error" in row]
    unable = sum(error.startswith("the model itself") for error in errors)
    worst = max((row["fold_diff"] for row in folded), default=0.0)
    return [
        name, len(folded), _sum(folded, "run"), _sum(folded, "fold_left"), f"{worst:.1e}",
        sum(map(_is_off, folded)), len(errors) - unable, unable,
    ]  # fmt: skip


def _fold_reasons(ran: Sequence[Row]) -> str:
    """Return the most common reasons for a norm that stays, qualified names left out."""
    reasons: Counter[str] = Counter()
    for row in ran:
        for reason, count in row.get("fold_skips", {}).items():
            reasons[_QUALIFIED.sub("…", reason.partition(";")[0])] += count
    return _bullets(f"{count}: {reason}" for reason, count in reasons.most_common(15))


def _sum(rows: Iterable[Row], key: str) -> int:
    return sum(row.get(key, 0) for row in rows)


def _of(rows: Sequence[Row], key: str) -> str:
    there = [row for row in rows if key in row]
    return f"{_sum(there, key)} of {_sum(there, 'run')}"


def _times(ran: Sequence[Row]) -> str:
    traced = sum("trace_seconds" in row for row in ran)
    tried = traced + sum("trace_error" in row for row in ran)
    seconds = [row["capture_seconds"] for row in ran]
    return (
        f"`torch.fx.symbolic_trace` succeeds on {traced} of {tried} architectures that it was "
        f"tried on, `capture` on all {len(ran)} that run; it takes {median(seconds):.2f} s in the "
        f"median and {max(seconds):.1f} s at most, on a machine that did other work. "
        "`python -m benchmarks.capture_time` compares the two with care."
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Nothing."


def _grouped(rows: Sequence[Row], status: str) -> str:
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == status:
            groups.setdefault(row["error"].splitlines()[0][:140], []).append(row["name"])
    return _bullets(
        f"{len(names)}: {reason} ({', '.join(names[:4])}{' …' if len(names) > 4 else ''})"
        for reason, names in sorted(groups.items(), key=lambda item: -len(item[1]))
    )


def _arithmetic(ran: Sequence[Row]) -> str:
    named = [f"{row['name']} ({row['arithmetic']})" for row in ran if row["arithmetic"]]
    text = ", ".join(named) or "none"
    return f"Frozen norms are a constant map, y = x·a + b, and `bn-to-gn` says so for each: {text}."


def _opaque(rows: Sequence[Row]) -> str:
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(set(row.get("opaque", {}).values()))
    return _bullets(f"{count} architectures: {reason}" for reason, count in reasons.most_common(12))
