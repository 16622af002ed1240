"""`rewrite inspect --balance`: how far the two sides of each channel are from balanced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from rewrite.rescaling.balance_report import BalanceReport


def measured_balance(
    options: argparse.Namespace, model: nn.Module, inputs: tuple[Any, ...] | None
) -> BalanceReport:
    """Measure the balance of a model, and draw --plot, if it was given.

    Raises:
        OptionError: --plot is neither a .png nor an .svg file.
    """
    from rewrite.rescaling.balance_report import balance_report

    report = balance_report(model, inputs)
    if options.plot is not None:
        report.plot(options.plot)
    return report
