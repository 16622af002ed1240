"""Checkpoint folders beside the road in memory, family by family: are the results the same bits?

    folder -> convert_checkpoint -> load            =            folder -> load -> convert

Each family of `benchmarks.transformer_folds` is made tiny with random weights, saved as
transformers saves it (experts one by one, where its checkpoints have them so), and folded by both
roads. A row is a process of its own with a limit of time and memory; a run takes up where another
stopped.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from benchmarks._table import environment, table, write_section
from benchmarks.sweep.rows import Row, append, read
from benchmarks.sweep.workers import Limits, run_all
from benchmarks.transformer_families import families, made
from passes import FoldNorm
from rewrite.errors import RewriteError
from rewrite.outcomes import Change
from rewrite.report import Report

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"


def measure(name: str) -> Row:
    """Convert one family by both roads and compare."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    family = next(family for family in families() if family.name == name)
    try:
        model = made(family, tied=False)
    except Exception as error:  # noqa: BLE001 - transformers may raise anything
        return {"name": name, "status": "not made", "reason": _short(error)}
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "source", Path(place) / "target"
        try:
            model.to(torch.bfloat16).save_pretrained(source)  # type: ignore[operator]  # of transformers
        except Exception as error:  # noqa: BLE001 - so may its writer
            return {"name": name, "status": "not saved", "reason": _short(error)}
        try:
            report = rewrite.convert_checkpoint(source, target, FoldNorm(untie=True), verify=False)
            folded = rewrite.convert(rewrite.load(source), FoldNorm(untie=True), verify=False)
            left = _left_alone(report, folded.report)
            if not report.changes:
                status = "nothing to fold" if not folded.report.changes else "folds in memory only"
                reasons = left or {skip.reason for skip in report.skips}
                return {"name": name, "status": status, "reason": "; ".join(sorted(reasons)[:1])}
            if not folded.report.changes:
                note = "; ".join(folded.report.notes) or "the model takes no call that is known"
                return {"name": name, "status": "folds in the folder only", "reason": note}
            if left:
                kept = tuple(change.target for change in report.changes)
                loaded = rewrite.load(source)
                folded = rewrite.convert(loaded, FoldNorm(untie=True), only=kept, verify=False)
            written = rewrite.load(target)
        except (RewriteError, RuntimeError) as error:
            reason = _short(error).replace(f"{place}/", "")
            return {"name": name, "status": "declined", "reason": reason}
        wrong = differences(written, folded.model, folded.report.changes)
    status = "equal" if not wrong else "different"
    row = {"name": name, "status": status, "folds": len(report.changes), "reason": "; ".join(wrong)}
    return {**row, "left": sum(left.values()), "why": "; ".join(left)}


def _left_alone(ours: Report, theirs: Report) -> dict[str, int]:
    """Return why a folder leaves alone what folds in memory, and how often each."""
    done = {change.target for change in ours.changes}
    reasons = {skip.target: skip.reason for skip in ours.skips}
    missed = [change.target for change in theirs.changes if change.target not in done]
    owners = {target: target.rpartition(".")[0] for target in missed}
    found = (reasons.get(t) or reasons.get(owners[t], "no site of the folder") for t in missed)
    return dict(Counter(found))


def differences(written: nn.Module, folded: nn.Module, changes: tuple[Change, ...]) -> list[str]:
    """Return the tensors that are not the same bits; a folded norm may be gone in memory."""
    ours: dict[str, Tensor] = written.state_dict()
    theirs: dict[str, Tensor] = folded.state_dict()
    targets = {change.target for change in changes}
    wrong = []
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None:
            # A class that has all biases or none asks for zeros beside those that appear.
            zeros = name.endswith(".bias") and not tensor.any()
            if name.rpartition(".")[0] not in targets and not zeros:
                wrong.append(f"{name} is not in memory")
        elif tensor.shape != other.shape or not torch.equal(tensor, other):
            wrong.append(f"{name} differs")
    return wrong + [f"{name} is not in the folder" for name in theirs if name not in ours]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[-240:]


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, the last of each family, in the order of families."""
    held = {row["name"]: row for row in read(out)}
    return [held[family.name] for family in families() if family.name in held]


def section(rows: list[dict[str, Any]]) -> str:
    """Return the table of the documentation."""
    counts = {key: [r for r in rows if r["status"] == key] for key in dict.fromkeys(
        row["status"] for row in rows
    )}  # fmt: skip
    equal = counts.get("equal", [])
    said = ", ".join(f"{len(held)} {key}" for key, held in counts.items())
    other = [(r["name"], r["status"], r.get("reason", "")) for r in rows if r not in equal]
    other += [(r["name"], f"{r['left']} left alone", r["why"]) for r in equal if r.get("left")]
    listed = ", ".join(f"{row['name']} {row['folds']}" for row in equal)
    return (
        f"`python -m benchmarks.folder_families`\n\n{said}. The same bits, with the norms folded: "
        f"{listed}. Below: the others, and what a folder leaves alone that folds in memory.\n\n"
        f"{table(['family', '', 'why'], other)}\n\n{environment('transformers')}."
    )


def main() -> None:
    """Run, and with `--write` put the table into docs/transformers.md."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("families", nargs="*", help="only these")
    arguments.add_argument("--out", type=Path, default=Path("folder_families.jsonl"))
    arguments.add_argument("--write", action="store_true", help="write docs/transformers.md")
    given = arguments.parse_args()
    done = {row["name"] for row in rows_of(given.out)}
    names = given.families or [f.name for f in families() if f.name not in done]
    for row in run_all(names, measure, Limits(300.0, 8_000), 1):
        append(given.out, row)
        print(row["name"], row["status"], row.get("reason", ""), flush=True)
    text = section(rows_of(given.out))
    print(text)
    if given.write:
        write_section(PAGE, "folder-families", text)


if __name__ == "__main__":
    main()
