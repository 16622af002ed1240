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
    inferred = or_inferred(options, model, inputs)
    if inferred.inputs is None:
        raise OptionError(
            f"--signal runs the model; {inferred.missing}; pass --input, such as 8x3x224x224"
        )
    batch = inferred.inputs
    with ProgressLine(enabled=not options.quiet) as progress:
        progress("one forward and one backward")
        measured = signal(model, batch, seed=options.seed, progress=progress)
    if options.plot is not None:
        before = None
        if options.before is not None:
            before = signal(load_model(options, options.before), batch, seed=options.seed)
        measured.plot(options.plot, before=before)
    write_report(options, measured)
    return OK
