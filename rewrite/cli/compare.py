"""The command `rewrite compare`: two models beside each other, module by module."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.cli.common import (
    OK,
    add_model_arguments,
    console,
    example_inputs,
    load_model,
    own_provenance,
)

if TYPE_CHECKING:
    from rewrite.equivalence.side_by_side import SideBySide


def add_parsers(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "compare",
        help="show two models beside each other, module by module, with the error of each",
        description="Show where two models differ: modules, parameters, and, on an input, how far "
        "the values of each module of B are from the nearest value of A. Nothing is judged: the "
        "exit code is 0; `rewrite verify A B` judges.",
    )
    parser.add_argument("model", metavar="A", help="the original")
    parser.add_argument("other", metavar="B", help="what stands beside it")
    add_model_arguments(parser)
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Compare, print the modules that differ, and write what the options name."""
    from rewrite.cli.common import check_report, or_inferred
    from rewrite.equivalence.side_by_side import side_by_side
    from rewrite.runtime.inputs import Inputs

    check_report(options, options.model, options.other)
    before = load_model(options, options.model)
    inferred = or_inferred(options, before, example_inputs(options, before))
    given = None if inferred.inputs is None else Inputs.of(inferred.inputs)
    found = side_by_side(before, load_model(options, options.other), given, options.seed)
    _write(options, found)
    if not options.quiet:
        if given is None:
            print(f"{inferred.missing}; so nothing was run: pass --input")
        for line in found.tables():
            console().print(line)
    return OK


def _write(options: argparse.Namespace, found: SideBySide) -> None:
    from rewrite.files import write_bytes

    if options.report:
        write_bytes(options.report, found.to_json().encode())
    if options.html:
        from rewrite.html.pages import comparison_page

        known = own_provenance(options.model, options.other)
        title = f"{Path(options.model).name} and {Path(options.other).name}"
        write_bytes(options.html, comparison_page(found, known, title).render().encode())
