"""`rewrite inspect --path-norm` and `--balance`: what rescalings keep and change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewrite.cli.common import OK, write_report

if TYPE_CHECKING:
    import argparse

    from torch import nn


def run_balance(
    options: argparse.Namespace, model: nn.Module, inputs: tuple[Any, ...] | None
) -> int:
    """Print how balanced the weights are, write the JSON and the picture that the options name.

    Raises:
        OptionError: the picture is no .png or .svg file.
    """
    from rewrite.rescaling.balance_report import balance_report

    report = balance_report(model, inputs)
    if options.plot is not None:
        report.plot(options.plot)
    write_report(options, report)
    return OK


def run_path_norm(
    options: argparse.Namespace, model: nn.Module, inputs: tuple[Any, ...] | None
) -> int:
    """Print the path norms and write their JSON, as the options say.

    Raises:
        OptionError: no input is known.
    """
    from rewrite.rescaling.path_report import path_norm_report

    write_report(options, path_norm_report(model, inputs))
    return OK
