"""Export and verification to ONNX over many architectures: verdicts, and time against the export.

    python -m benchmarks.verify_onnx

Each architecture is exported with `rewrite.export` and the file is verified as an export does by
default: checker, batch sizes, outputs and every value on the way. The ratio is the verification's
time to the export's own. What fails is named with its cause.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import QUICK, UnbuildableError, build
from rewrite.errors import RewriteError
from rewrite.onnx import export, verify_onnx
from rewrite.verification import Level

HEADER = ["architecture", "nodes", "export, s", "verify, s", "ratio", "error", "noise", "verdict"]


class OverTimeError(Exception):
    """An architecture took longer than it may."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__)
    options.add_argument("--limit", type=int, default=300, help="seconds an architecture may take")
    options.add_argument("--rows", type=Path, help="keep finished rows here, and go on from them")
    options.add_argument("names", nargs="*", default=QUICK, metavar="PACKAGE:ARCHITECTURE")
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = list(measured(chosen.names, chosen.limit, chosen.rows))
    publish("verify-onnx", "Export to ONNX, verified", body(rows), write=chosen.write)


def body(rows: list[dict[str, Any]]) -> str:
    """Return the text of the section."""
    done = [row for row in rows if row["ratio"] is not None]
    verified = [row for row in done if row["verdict"] == "verified"]
    refused = [row for row in rows if row["ratio"] is None]
    export_time, verify_time = (sum(row[key] for row in done) for key in ("export", "verify"))
    ratios = sorted(row["ratio"] for row in done)
    summary = (
        f"{environment('onnx', 'onnxruntime', 'timm', 'torchvision')}. "
        f"{len(rows)} architectures: {len(verified)} verified, "
        f"{len(done) - len(verified)} found wrong, {len(refused)} not exported. Verification took "
        f"{verify_time / export_time:.2f} of the time of the exports together, "
        f"{ratios[len(ratios) // 2]:.2f} in the median (target: at most 0.5)."
    )
    return f"{summary}\n\n{table(HEADER, [_cells(row) for row in rows])}"


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    return [
        row["name"], shown("nodes", "d"), shown("export", ".1f"), shown("verify", ".1f"),
        shown("ratio", ".2f"), shown("error", ".0e"), shown("noise", ".0e"), row["verdict"],
    ]  # fmt: skip


def measured(names: Sequence[str], limit: int, kept: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each architecture, those from `kept` first read."""
    known = {}
    if kept is not None and kept.exists():
        known = {row["name"]: row for row in map(json.loads, kept.read_text().splitlines())}
    for name in names:
        row = known.get(name) or measure(name, limit)
        if kept is not None and name not in known:
            with kept.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        yield row


def measure(name: str, limit: int) -> dict[str, Any]:
    """Export and verify one architecture."""
    row: dict[str, Any] = {"name": name, "ratio": None}
    try:
        with _at_most(limit), tempfile.TemporaryDirectory() as folder:
            model, inputs = build(name)
            path = Path(folder) / "model.onnx"
            begin = time.perf_counter()
            notes = export(model, path, example_inputs=inputs, verify=False).notes
            exported = time.perf_counter()
            found = verify_onnx(path, model, inputs, level=Level.QUICK)
            done = time.perf_counter()
    except (RewriteError, UnbuildableError) as error:
        return {**row, "verdict": _line(str(error))}
    except OverTimeError:
        return {**row, "verdict": f"over {limit} s"}
    return {
        **row,
        "nodes": sum(found.census.values()),
        "export": exported - begin,
        "verify": done - exported,
        "ratio": (done - exported) / (exported - begin),
        "error": found.max_rel,
        "noise": found.noise,
        "notes": notes,
        "verdict": "verified" if found.ok else _line("; ".join(found.reasons)),
    }


def _line(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) < 160 else flat[:157] + "…"


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise OverTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
