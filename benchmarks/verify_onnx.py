"""Export and verification to ONNX over many architectures: verdicts, and time against the export.

    python -m benchmarks.verify_onnx                            the quick tier; resumable
    python -m benchmarks.verify_onnx timm:resnet50 --rows rows.jsonl
    python -m benchmarks.verify_onnx --draw 150                 so many of timm, drawn at random

Each architecture is exported with `rewrite.export` and the file is verified as an export does by
default: checker, batch sizes, outputs and every value on the way. Times are of the CPU, after an
export and a verification of a small model that load what both need; the ratio is the verification's
to the export's own. Each runs in a process of its own with a limit of time and of memory, and what
fails is named with its cause. What torch.export refuses is traced (`--exporter torchscript`), and
the verdict says so. Rows are appended as JSON lines; a row that is there is not measured
again.
"""

from __future__ import annotations

import importlib
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import PACKAGES, QUICK, UnbuildableError, build, construct, installed
from benchmarks.corpus import names as all_names
from benchmarks.sweep.rows import append, read
from benchmarks.sweep.workers import Limits, run_all
from rewrite.equivalence.verification import Level
from rewrite.errors import ExportError, RewriteError
from rewrite.onnx.export import export
from rewrite.onnx.verify import verify_onnx

ROWS = Path(__file__).parent / "verify_onnx.jsonl"
DRAWN = Path(__file__).parent / "verify_onnx_drawn.jsonl"
MOST_PARAMETERS = 30_000_000
LARGER = "not drawn"
HEADER = ["architecture", "nodes", "export, s", "verify, s", "ratio", "error", "noise", "verdict"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=600, help="limit for one architecture")
    options.add_argument("--megabytes", type=int, default=8_000, help="limit for one architecture")
    options.add_argument("--rows", type=Path, help="where the rows are kept")
    options.add_argument(
        "--draw", type=int, metavar="N", help="architectures of timm below 30 M parameters, drawn"
    )
    options.add_argument("--within", type=float, metavar="SECONDS", help="begin no other after it")
    options.add_argument("names", nargs="*", default=QUICK, metavar="PACKAGE:ARCHITECTURE")
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    chosen.rows = chosen.rows or (ROWS if chosen.draw is None else DRAWN)
    order = sorted(all_names("timm")) if chosen.draw else []
    random.Random(0).shuffle(order)
    names = order or [name for name in chosen.names if installed(name)]
    limits = Limits(chosen.seconds, chosen.megabytes)
    known = {row["name"]: row for row in read(chosen.rows)}
    begin = time.monotonic()

    def pending() -> Iterator[str]:
        for name in names:
            counted = [row for row in known.values() if row["status"] != LARGER]
            late = chosen.within is not None and time.monotonic() - begin > chosen.within
            if late or len(counted) == chosen.draw:
                return
            if name not in known:
                yield name

    if any(name not in known for name in names):
        _warm_up(names)
    work = measure if chosen.draw is None else measure_small
    for row in run_all(pending(), work, limits, workers=1):
        known[row["name"]] = row
        append(chosen.rows, row)
    done = [known[name] for name in names if name in known]
    if chosen.draw is None:
        publish("verify-onnx", "Export to ONNX, verified", body(done), write=chosen.write)
    else:
        counted = [row for row in done if row["status"] != LARGER]
        text = drawn_body(counted, chosen.draw)
        publish("verify-onnx-drawn", "Export to ONNX, drawn", text, write=chosen.write)


def measure_small(name: str) -> dict[str, Any]:
    """Export and verify one architecture, unless it has 30 M parameters or more."""
    try:
        size = sum(p.numel() for p in construct(name, device="meta").parameters())
    except UnbuildableError as error:
        return {"name": name, "status": LARGER, "error": _line(str(error))}
    return measure(name) if size < MOST_PARAMETERS else {"name": name, "status": LARGER}


def drawn_body(rows: list[dict[str, Any]], asked: int) -> str:
    """Return the text of the section of drawn architectures: the count, and the special ones."""
    of = {kind: [r for r in rows if r["status"] == kind] for kind in ("verified", "wrong")}
    rest = [row for row in rows if row["status"] not in of]
    done = [row for row in rows if "verify" in row]
    export_time, verify_time = (sum(row[key] for row in done) for key in ("export", "verify"))
    traced = [row for row in done if any("torchscript" in note for note in row["notes"])]
    written = [row for row in done if any("written out" in note for note in row["notes"])]
    summary = (
        f"{environment('onnx', 'onnxruntime', 'timm')}. {len(rows)} of {asked} drawn "
        f"architectures of timm with random statistics: {len(of['verified'])} verified, "
        f"{len(of['wrong'])} found wrong, {len(rest)} not exported. {len(written)} with attention "
        f"written out, {len(traced)} traced. Verification took {verify_time / export_time:.2f} of "
        "the CPU time of the exports together (target: at most 0.35)."
    )
    special = [*of["wrong"], *rest, *written, *traced]
    named = list({row["name"]: row for row in special}.values())
    return f"{summary}\n\n{table(HEADER, [_cells(row) for row in named])}"


def body(rows: list[dict[str, Any]]) -> str:
    """Return the text of the section."""
    done = [row for row in rows if "verify" in row]
    verified = [row for row in done if row["status"] == "verified"]
    export_time, verify_time = (sum(row[key] for row in done) for key in ("export", "verify"))
    ratios = sorted(row["verify"] / row["export"] for row in done)
    summary = (
        f"{environment('onnx', 'onnxruntime', 'timm', 'torchvision')}. "
        f"{len(rows)} architectures: {len(verified)} verified, "
        f"{len(done) - len(verified)} found wrong, {len(rows) - len(done)} not exported. "
        f"Verification took {verify_time / export_time:.2f} of the CPU time of the exports "
        f"together, {ratios[len(ratios) // 2]:.2f} in the median (target: at most 0.5)."
    )
    return f"{summary}\n\n{table(HEADER, [_cells(row) for row in rows])}"


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    ratio = f"{row['verify'] / row['export']:.2f}" if "verify" in row else ""
    verdict = " · ".join(filter(None, [row["status"], row.get("error"), *row.get("notes", ())]))
    return [
        row["name"], shown("nodes", "d"), shown("export", ".1f"), shown("verify", ".1f"), ratio,
        shown("max_rel", ".0e"), shown("noise", ".0e"), verdict,
    ]  # fmt: skip


def _warm_up(names: Sequence[str]) -> None:
    """Load, before any process is forked, what all of them need."""
    torch.set_num_threads(1)
    for name in dict.fromkeys(PACKAGES[name.partition(":")[0]] for name in names):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        _export_and_verify(nn.Linear(2, 2).eval(), (torch.ones(2, 2),), Path(folder))


def measure(name: str) -> dict[str, Any]:
    """Export and verify one architecture."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name}
    try:
        model, inputs = build(name)
        with tempfile.TemporaryDirectory() as folder:
            return row | _export_and_verify(model, inputs, Path(folder))
    except (RewriteError, UnbuildableError) as error:
        return {**row, "status": "not exported", "error": _line(str(error))}


def _export_and_verify(model: nn.Module, inputs: Any, folder: Path) -> dict[str, Any]:
    path = folder / "model.onnx"
    begin = time.process_time()
    notes: tuple[str, ...]
    try:
        notes = export(model, path, example_inputs=inputs, verify=False).notes
    except ExportError as error:
        begin = time.process_time()
        traced = export(model, path, example_inputs=inputs, verify=False, exporter="torchscript")
        notes = (_line(str(error)), *traced.notes)
    exported = time.process_time()
    found = verify_onnx(path, model, inputs, level=Level.QUICK)
    done = time.process_time()
    return {
        "status": "verified" if found.ok else "wrong",
        "nodes": sum(found.operator_counts.values()),
        "export": exported - begin,
        "verify": done - exported,
        "max_rel": found.max_rel,
        "noise": found.noise,
        "notes": notes,
        "error": _line("; ".join(found.reasons)),
    }


def _line(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) < 160 else flat[:157] + "…"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
