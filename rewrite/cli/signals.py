"""`rewrite inspect --signal`: how activations and gradients propagate through a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rewrite.cli.common import load_model, or_inferred
from rewrite.errors import OptionError
from rewrite.signals.measure import signal

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from rewrite.signals.report import Signal


def measured_signal(
    options: argparse.Namespace,
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    progress: Callable[[str], None],
) -> Signal:
    """Measure signal propagation through a model, and draw --plot, if it was given.

    Raises:
        OptionError: no input was given and none can be inferred.
    """
    progress("looking for an input that fits")
    inferred = or_inferred(options, model, inputs, small=True)
    if inferred.inputs is None:
        raise OptionError(
            f"--signal runs the model; {inferred.missing}; pass --input, such as 8x3x224x224"
        )
    progress("one forward and one backward")
    measured = signal(model, inferred.inputs, seed=options.seed, progress=progress)
    if options.plot is not None:
        before = None
        if options.before is not None:
            progress(f"the same of {options.before}")
            other = load_model(options, options.before)
            before = signal(other, inferred.inputs, seed=options.seed, progress=progress)
        measured.plot(options.plot, before=before)
    return measured
