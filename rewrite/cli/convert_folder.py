"""`rewrite convert` of a checkpoint folder: tensor by tensor, into a new folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rewrite.cli.common import NOTHING, OK, complain, own_provenance, write_report
from rewrite.errors import OptionError
from rewrite.files.places import check_distinct

if TYPE_CHECKING:
    from rewrite.protocol import Pass

_IN_MEMORY = ("calibration", "onnx", "recover", "factory", "size", "mean", "std", "input")
"""Options that need the model in memory."""


def run_convert_folder(options: argparse.Namespace, chosen: Sequence[Pass]) -> int:
    """Convert a folder and print its report; return the exit code.

    Raises:
        OptionError: an option was given that needs the whole model in memory.
    """
    for name in _IN_MEMORY:
        if getattr(options, name, None) is not None:
            raise OptionError(
                f"--{name} needs the model in memory; a folder is converted tensor by tensor"
            )
    from rewrite.files import check_writable
    from rewrite.progress import ProgressLine
    from rewrite.sharded.convert import convert_checkpoint, plan_checkpoint

    source = Path(options.model)
    target = Path(options.output) if options.output else _beside(source)
    reports = [("--report", options.report), ("--html", options.html)]
    check_distinct([("--output", target), *reports])
    for _, report in reports:
        if report is not None:
            check_writable(report)
    with ProgressLine(enabled=not options.quiet) as progress:
        if options.dry_run:
            found = plan_checkpoint(source, chosen, only=options.only, skip=options.skip)
        else:
            found = convert_checkpoint(
                source, target, list(chosen), only=options.only, skip=options.skip,
                verify=not options.no_verify, seed=options.seed, progress=progress,
            )  # fmt: skip
    page = None
    if options.html:
        page = found.to_html(provenance=own_provenance(str(source / "config.json")))
    write_report(options, found, page)
    if not found.changes:
        if options.allow_noop:
            return OK
        return complain("nothing to rewrite; nothing was written", NOTHING)
    if options.dry_run and not (options.quiet or options.json):
        print("nothing written (--dry-run)")
    return OK


def _beside(source: Path) -> Path:
    """Return the default output folder: beside the source, whatever the working directory."""
    own = source if source.name not in ("", "..") else source.resolve()
    return own.with_name(f"{own.name}.rewritten")
