"""The command `rewrite passes`."""

from __future__ import annotations

import argparse
from typing import Any

from rewrite import registry
from rewrite.cli.common import OK, console


def add_parsers(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("passes", help="list the passes, their options and contracts")
    parser.set_defaults(run=_run_passes)


def _run_passes(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    table = Table("pass", "contract", "what it does", "options", box=None, pad_edge=False)
    for name, entry in registry.entries().items():
        kind = registry.pass_class(name)
        summary = (kind.__doc__ or "").strip().partition("\n")[0]
        given = "\n".join(
            f"{option.flag} ({option.kind.__name__}, default {option.default}): {option.help}"
            for option in registry.options(kind)
        )
        package = entry.dist.name if entry.dist is not None else entry.value
        shown = name if package == "rewrite" else f"{name} [from {package}]"
        table.add_row(*map(Text, (shown, str(kind.contract), summary, given)))
    console().print(table)
    return OK
