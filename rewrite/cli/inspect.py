"""The command `rewrite inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rewrite.cli.common import (
    MODEL_HELP,
    OK,
    Reported,
    add_model_arguments,
    example_inputs,
    load_model,
    write_report,
)
from rewrite.errors import OptionError

if TYPE_CHECKING:
    from torch import nn


def add_parsers(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect", help="show what is inside a model, and what passes would find"
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--signal", action="store_true",
                        help="measure how activations and gradients propagate")  # fmt: skip
    what.add_argument("--path-norm", action="store_true",
                        help="the norm of all paths, which rescalings do not change")  # fmt: skip
    what.add_argument("--balance", action="store_true",
                        help="how far the two sides of each channel are from balanced")  # fmt: skip
    parser.add_argument("--plot", metavar="OUT.png|OUT.svg",
                        help="with --signal or --balance: draw it")  # fmt: skip
    parser.add_argument("--before", metavar="MODEL",
                        help="with --plot: draw this model in the same picture")  # fmt: skip
    add_model_arguments(parser)
    parser.set_defaults(run=_run_inspect)


def _run_inspect(options: argparse.Namespace) -> int:
    from rewrite.files import check_writable
    from rewrite.progress import ProgressLine

    if options.plot and not (options.signal or options.balance):
        raise OptionError(f"--plot {options.plot}: draws what --signal or --balance measures")
    if options.before and not (options.signal and options.plot):
        raise OptionError(f"--before {options.before}: is drawn by --signal with --plot")
    if options.report:
        check_writable(options.report)
    with ProgressLine(enabled=not options.quiet) as progress:
        progress("loading")
        model = _opened(options)
        found = _found(options, model, example_inputs(options, model), progress)
    write_report(options, found)
    return OK


def _found(
    options: argparse.Namespace,
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    progress: Callable[[str], None],
) -> Reported:
    """Return the report that the options ask for; draw its plot, if one is wanted."""
    if options.signal:
        from rewrite.cli.signals import measured_signal

        return measured_signal(options, model, inputs, progress)
    if options.balance:
        from rewrite.rescaling.balance_report import balance_report

        progress("looking for what writes and what reads each channel")
        balance = balance_report(model, inputs)
        if options.plot is not None:
            balance.plot(options.plot)
        return balance
    if options.path_norm:
        from rewrite.rescaling.path_report import path_norm_report

        progress("summing over the paths")
        return path_norm_report(model, inputs)
    from rewrite.inspection import inspect_model

    progress("looking for norms, and what passes would find")
    return inspect_model(model, inputs)


def _opened(options: argparse.Namespace) -> nn.Module:
    """Return the model; of a checkpoint folder only the structure, without reading weights."""
    from rewrite.files import is_folder

    if is_folder(options.model) and not (options.signal or options.path_norm):
        from rewrite.hub.folder import open_folder
        from rewrite.hub.structure import structure_of

        return structure_of(open_folder(options.model)).model
    return load_model(options, options.model)
