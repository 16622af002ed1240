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
import itertools
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import PACKAGES, QUICK, UnbuildableError, build, construct, installed
from benchmarks.corpus import names as all_names
from benchmarks.coverage import read
from benchmarks.sweep.workers import Limits, run_all
from rewrite.equivalence.verification import Level
from rewrite.errors import ExportError, RewriteError
from rewrite.onnx.export import export
from rewrite.onnx.verify import verify_onnx

ROWS = Path(__file__).parent / "verify_onnx.jsonl"
DRAWN = Path(__file__).parent / "verify_onnx_drawn.jsonl"
MOST_PARAMETERS = 30_000_000
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
    names = drawn(chosen.draw) if chosen.draw else [n for n in chosen.names if installed(n)]
    limits = Limits(chosen.seconds, chosen.megabytes)
    measured = {row["name"] for row in read(chosen.rows)}
    pending = [name for name in names if name not in measured]
    _warm_up(names if pending else [])
    begin = time.monotonic()
    in_time = itertools.takewhile(
        lambda _: chosen.within is None or time.monotonic() - begin < chosen.within, pending
    )
    for row in run_all(in_time, measure, limits, workers=1):
        with chosen.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    rows = {row["name"]: row for row in read(chosen.rows)}
    done = [rows[name] for name in names if name in rows]
    if chosen.draw is None:
        publish("verify-onnx", "Export to ONNX, verified", body(done), write=chosen.write)
    else:
        text = drawn_body(done, len(names))
        publish("verify-onnx-drawn", "Export to ONNX, drawn", text, write=chosen.write)


def drawn(count: int) -> list[str]:
    """Return so many architectures of timm below 30 M parameters, in an order drawn once."""
    order = sorted(all_names("timm"))
    random.Random(0).shuffle(order)
    found: list[str] = []
    for name in order:
        if len(found) == count:
            break
        try:
            model = construct(name, device="meta")
        except UnbuildableError:
            continue
        if sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS:
            found.append(name)
    return found


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
