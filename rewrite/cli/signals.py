"""`rewrite inspect --signal`: how activations and gradients propagate through a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewrite.cli.common import OK, load_model, or_inferred, write_report
from rewrite.errors import OptionError
from rewrite.progress import ProgressLine
from rewrite.signals.measure import signal

if TYPE_CHECKING:
    import argparse

    from torch import nn


def run_signal(
    options: argparse.Namespace, model: nn.Module, inputs: tuple[Any, ...] | None
) -> int:
    """Measure, print the table, write the JSON and the picture that the options name.

    Raises:
        OptionError: no input is known.
    """
    inputs = or_inferred(options, model, inputs)
    if inputs is None:
        raise OptionError("--signal runs the model; pass --input, such as 8x3x224x224")
    with ProgressLine(enabled=not options.quiet) as progress:
        progress("one forward and one backward")
        measured = signal(model, inputs, seed=options.seed, progress=progress)
    if options.plot is not None:
        before = None
        if options.before is not None:
            before = signal(load_model(options, options.before), inputs, seed=options.seed)
        measured.plot(options.plot, before=before)
    write_report(options, measured)
    return OK
