"""What the commands share: exit codes, MODEL arguments, example inputs, reports, the console."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rewrite.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn


OK, FAILED, USAGE, NOTHING = 0, 1, 2, 3


MODEL_HELP = (
    "a checkpoint (.pt, .pth, .pt2, .safetensors), torchvision:NAME, timm:NAME, "
    "or package.module:factory"
)


class Reported(Protocol):
    """What a command found: printed as tables, written as JSON."""

    def to_json(self) -> str:
        """Return it as JSON."""
        ...

    def tables(self, *, verbose: bool = False) -> Iterable[Any]:
        """Return what rich prints of it; with `verbose` also rows that are alike."""
        ...


def complain(message: object, code: int) -> int:
    """Say what went wrong on standard error, and return `code`."""
    print(f"rewrite: {message}", file=sys.stderr)
    return code


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that opens a MODEL."""
    parser.add_argument(
        "--factory",
        metavar="PKG.MOD:CALLABLE",
        help="builds the model of a state dict; json keyword arguments in parentheses",
    )
    parser.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="allow the classes of a package in a pickled checkpoint (repeatable)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--input",
        metavar="SHAPE|FILE",
        help="1x3x224x224[,...] or a .npz/.npy/.pt file: what the model is run on",
    )
    parser.add_argument("--report", metavar="OUT.json", help="write the report as JSON")
    parser.add_argument("--html", metavar="OUT.html", help="write the report as one HTML page")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--verbose", action="store_true", help="print every row, also those alike")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def load_model(options: argparse.Namespace, reference: str) -> nn.Module:
    """Open a MODEL reference with the command's --factory and --trust."""
    from rewrite.checkpoint.load import load

    return load(reference, factory=options.factory, trust=options.trust)


def example_inputs(options: argparse.Namespace, model: nn.Module) -> tuple[Any, ...] | None:
    """Return what --input describes, or None."""
    if options.input is None:
        return None
    from rewrite.runtime.input_files import load_inputs, parse_shapes

    if Path(options.input).suffix in (".npz", ".npy", ".pt", ".pth"):
        return load_inputs(options.input)
    return parse_shapes(options.input, model, options.seed)


def write_report(options: argparse.Namespace, found: Reported, page: str | None = None) -> None:
    """Print what was found and write its JSON and its HTML page, as the options say."""
    from rewrite.files import write_bytes

    text = _with_provenance(options, found.to_json()) if options.report or options.json else ""
    if options.report:
        write_bytes(options.report, text.encode())
    if options.html and page is not None:
        write_bytes(options.html, page.encode())
    if options.json:
        print(text.rstrip())
    elif not options.quiet:
        screen = console()
        for shown in found.tables(verbose=options.verbose):
            screen.print(shown)


def _with_provenance(options: argparse.Namespace, report: str) -> str:
    """Return a report's JSON with the command line, the files that were read, and the versions."""
    files = [getattr(options, name, None) for name in ("model", "other", "input")]
    found = {**json.loads(report), "provenance": own_provenance(*files)}
    return json.dumps(found, indent=2) + "\n"


def own_provenance(*files: str | None) -> dict[str, str]:
    """Return the command line, the hashes of the files that were read, and the versions."""
    from rewrite.provenance import own_command, provenance

    return provenance([name for name in files if name is not None], own_command())


def console() -> Console:
    """Return the console that everything is printed on; wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def _written_reports(options: argparse.Namespace) -> Iterable[tuple[str, str | None]]:
    """Yield the flag and the value of each report that a command may be asked to write."""
    for name in ("report", "html", "node_data"):
        yield f"--{name.replace('_', '-')}", getattr(options, name, None)


def check_report(options: argparse.Namespace, *others: str | None) -> None:
    """Raise when a report cannot be written, or would take the place of another file."""
    from rewrite.files import check_writable

    taken = [*others, options.input]
    for flag, name in _written_reports(options):
        if not name:
            continue
        place = check_writable(name).resolve()
        for other in taken:
            if other is not None and Path(other).resolve() == place:
                raise OptionError(f"{flag} {name}: is {other}; give the report a place")
        taken.append(name)
