"""The command `rewrite compare`: two models beside each other, module by module."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rewrite.cli.common import (
    OK,
    add_model_arguments,
    add_page_argument,
    example_inputs,
    load_model,
    own_provenance,
    write_report,
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
    add_page_argument(parser)
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Compare, print the modules that differ, and write what the options name."""
    from rewrite.cli.checks import check_report
    from rewrite.cli.common import or_inferred
    from rewrite.equivalence.side_by_side import side_by_side
    from rewrite.progress import ProgressLine
    from rewrite.runtime.inputs import Inputs

    check_report(options)
    with ProgressLine(enabled=not options.quiet) as progress:
        progress("loading")
        before = load_model(options, options.model)
        after = load_model(options, options.other)
        progress("looking for an input that fits")
        inferred = or_inferred(options, before, example_inputs(options, before))
        given = None if inferred.inputs is None else Inputs.of(inferred.inputs)
        found = side_by_side(before, after, given, options.seed, progress)
        page = _page(options, found) if options.html else None
    if given is None and not options.quiet:
        print(f"{inferred.missing}; so nothing was run: pass --input", file=sys.stderr)
    write_report(options, found, page)
    return OK


def _page(options: argparse.Namespace, found: SideBySide) -> str:
    from rewrite.html.pages import comparison_page
    from rewrite.provenance import shown_path

    known = own_provenance(options.model, options.other)
    names = (shown_path(options.model), shown_path(options.other))
    return comparison_page(found, known, names).render()
