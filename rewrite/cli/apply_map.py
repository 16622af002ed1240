"""The command `rewrite apply-map`: fold or swap another checkpoint as the first one was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parsers(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "apply-map",
        help="fold or swap another checkpoint of an architecture by the report of the first",
        description="Rewrite a state dict by the report of an earlier fold or norm swap of the "
        "same architecture, without the model's code: nothing is traced or run.",
    )
    parser.add_argument("report", metavar="REPORT.json", help="what `convert --report` wrote")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a state dict of the old model")
    parser.add_argument("output", metavar="OUT", help=".safetensors, or else torch's format")
    parser.add_argument(
        "--undo",
        action="store_true",
        help="take back what the report says of ln-to-rms and rotate-stream; CHECKPOINT is what "
        "that conversion made",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    parser.set_defaults(run=run_apply_map)


def run_apply_map(options: argparse.Namespace) -> int:
    """Read the report and the checkpoint, write the folded one, and return the exit code."""
    from rewrite.fold.report_file import read_report

    report = read_report(Path(options.report))
    from rewrite.checkpoint.state_dict import read_state, write_state
    from rewrite.files import atomic_path
    from rewrite.fold.replay import apply_report
    from rewrite.fold.undo import undo_report
    from rewrite.progress import ProgressLine

    notes: tuple[str, ...] = ()
    with ProgressLine() as progress:
        progress("reading")
        state = read_state(Path(options.checkpoint))
        progress("applying")
        if options.undo:
            undone = undo_report(report, state)
            state, notes = undone.state, undone.notes
        else:
            state = apply_report(report, state)
        progress("saving")
        with atomic_path(options.output, overwrite=options.force) as temporary:
            write_state(state, temporary, Path(options.output).suffix)
    for note in notes:
        print(f"note: {note}")
    return 0
