"""The command `rewrite passes`: every pass in one table, or one pass with its options."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from rewrite import registry
from rewrite.cli.common import OK, console


def add_parsers(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "passes", help="list the passes, or show one with its options and an example"
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a pass, such as bn-to-gn")
    parser.set_defaults(run=_run_passes)


def _run_passes(options: argparse.Namespace) -> int:
    if options.name is not None:
        _show_one(options.name)
    else:
        _show_all()
    return OK


def _show_all() -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("pass", "contract", "what it does", box=None, pad_edge=False)
    for name, entry in registry.entries().items():
        kind = registry.pass_class(name)
        package = entry.dist.name if entry.dist is not None else entry.value
        shown = name if package == "rewrite" else f"{name} [from {package}]"
        table.add_row(*map(Text, (shown, str(kind.contract), _summary(kind))))
    console().print(table)
    console().print("rewrite passes NAME shows the options of one")


def _show_one(name: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    screen = console()
    kind = registry.pass_class(name)
    screen.print(Text(f"{name} ({kind.contract})", "bold"))
    screen.print(Text(inspect.cleandoc(kind.__doc__ or "")))
    given = list(registry.options(kind))
    if given:
        screen.print(Text("options", "bold"))
    for option in given:
        screen.print(Text(f"  {option.flag} ({option.kind.__name__}, default {option.default})"))
        if option.help:
            screen.print(Padding(Text(option.help), (0, 0, 0, 6), expand=False))
    screen.print(Text("example", "bold"))
    screen.print(Text(f"  rewrite convert {_flag(name, kind)} model.pt"))


def _flag(name: str, kind: Any) -> str:
    value = getattr(kind, "flag_value", None)
    return f"--{name}" if value is None else f"--{name} {value}"


def _summary(kind: Any) -> str:
    return str((kind.__doc__ or "").strip().partition("\n")[0])
