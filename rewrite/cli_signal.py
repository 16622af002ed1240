"""`rewrite inspect --signal`: how activations and gradients propagate through a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewrite.cli import OK, _finish, load_model
from rewrite.errors import OptionError
from rewrite.signals import signal

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
    if inputs is None:
        raise OptionError("--signal runs the model; pass --input, such as 8x3x224x224")
    measured = signal(model, inputs, seed=options.seed)
    if options.signal != "-":
        before = getattr(options, "before", None)
        other = signal(load_model(options, before), inputs, seed=options.seed) if before else None
        measured.plot(options.signal, before=other)
    _finish(options, measured)
    return OK
