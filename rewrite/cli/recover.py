"""The command `rewrite recover`: train a converted model to agree with its original."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.cli.common import (
    FAILED,
    INTERRUPTED,
    MODEL_HELP,
    OK,
    add_model_arguments,
    calibration_data,
    complain,
    default_output,
    load_model,
    save_model,
    write_report,
)
from rewrite.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from rewrite.training.recovered import Recovered

_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "loss": ("distill", "match"),
    "precision": ("no", "fp16", "bf16"),
}
_NUMBERS: dict[str, tuple[type, str]] = {
    "epochs": (int, "passes over the data (default 1)"),
    "rate": (float, "learning rate of a batch of 32; scaled linearly"),
    "batch_size": (int, "samples of a micro-batch (default: 400 steps an epoch, 2 to 8)"),
    "accumulate": (int, "micro-batches of a step (default 1)"),
    "weight_decay": (float, "normalized decay of the matrices of layers (default 0.05)"),
    "temperature": (float, "of the soft targets (default 2)"),
    "features": (float, "weight of the features at the swapped norms (default 0)"),
    "label_weight": (float, "share of the labels in the loss (default 0.5)"),
    "warmup": (float, "share of the steps in which the rate rises (default 0.1)"),
    "evaluations": (int, "how often agreement is measured (default 10)"),
    "patience": (int, "evaluations without a better agreement to stop after (default 0: never)"),
}


def add_parsers(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "recover",
        help="train a converted model until it answers as the original does",
        description="A few steps of training, without labels, that bring a converted model back.",
    )
    parser.add_argument("student", metavar="STUDENT", help=f"the converted model: {MODEL_HELP}")
    parser.add_argument("--teacher", metavar="TEACHER", required=True, help="the original model")
    parser.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help="a folder of images, a file of arrays, or package.module:factory",
    )
    parser.add_argument("-o", "--output", metavar="OUT.pt", help="default: STUDENT.recovered.pt")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    parser.add_argument(
        "--labels",
        action="store_true",
        help="the data have labels: an .npz of two arrays, or a factory",
    )
    parser.add_argument("--smoothing", default="0.1", help="of the labels: a number, or online")
    parser.add_argument("--recenter", action="store_true", help="let the anchors of the norms go")
    for name, choices in _CHOICES.items():
        parser.add_argument(f"--{name}", choices=choices, default=choices[0])
    for name, (kind, text) in _NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    parser.add_argument("--state", metavar="FOLDER", help="save the training there, and go on")
    parser.add_argument("--plot", metavar="OUT.png|svg", help="draw the curves")
    add_model_arguments(parser)
    parser.set_defaults(run=run_recover)


def run_recover(options: argparse.Namespace) -> int:
    """Open models and data, train, and write the result; return the exit code."""
    from rewrite.files import check_writable
    from rewrite.files.places import check_distinct

    output = Path(options.output or default_output(options.student, "recovered"))
    check_distinct([("--output", output), ("--report", options.report), ("--plot", options.plot)])
    check_writable(output, overwrite=options.force)
    for path in (options.report, options.plot):
        if path is not None:
            check_writable(path)
    from rewrite.progress import ProgressLine
    from rewrite.training.recover import recover

    settings = _settings(options)
    with ProgressLine(enabled=not options.quiet) as progress:
        progress("loading")
        student = load_model(options, options.student)
        teacher = load_model(options, options.teacher)
        data = open_data(options.data, student, labels=options.labels)
        recovered = recover(
            student, teacher, data, state=options.state, progress=progress, **settings
        )
    return finish(options, recovered, output)


def finish(options: argparse.Namespace, recovered: Recovered[nn.Module], output: Path) -> int:
    """Save, plot and report in the first process; return the exit code in all of them."""
    if not _is_first():
        return OK if recovered.ok else FAILED
    save_model(options, options.student, recovered.model, output)
    if getattr(options, "plot", None) is not None:
        recovered.plot(options.plot)
    write_report(options, recovered)
    if not recovered.ok:
        code = INTERRUPTED if recovered.interrupted else FAILED
        return complain(f"{recovered.stopped}; wrote the best state to {output}", code)
    return OK


def open_data(reference: str, model: nn.Module, *, labels: bool) -> Iterable[Any]:
    """Return the batches that DATA names; with `labels`, each ends in its labels.

    Labelled data are an .npz of two arrays (inputs, labels) or the batches of a factory.

    Raises:
        OptionError: the reference names no usable data.
    """
    from rewrite.files import is_there

    path = Path(reference)
    if not labels or not is_there(path):
        return calibration_data(reference, model)
    if path.suffix != ".npz":
        raise OptionError(f"{reference}: labels come in an .npz of two arrays, or from a factory")
    from rewrite.runtime.stored.array_files import read_arrays

    try:
        arrays = list(read_arrays(path).values())
    except (OSError, ValueError) as error:
        raise OptionError(f"{reference}: cannot be read: {error}") from error
    if len(arrays) != 2:
        raise OptionError(f"{reference}: holds {len(arrays)} arrays; inputs and labels are two")
    inputs, targets = arrays
    if targets.dtype.is_floating_point:
        raise OptionError(f"{reference}: labels are {targets.dtype}; save class numbers as int64")
    return [(inputs, targets.long())]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    named = {name: getattr(options, name) for name in _NUMBERS}
    smoothing = options.smoothing
    if smoothing != "online":
        try:
            smoothing = float(smoothing)
        except ValueError:
            raise OptionError(f"--smoothing {smoothing}: write a number, or online") from None
    return {name: value for name, value in named.items() if value is not None} | {
        **{name: getattr(options, name) for name in _CHOICES},
        "labels": options.labels, "recenter": options.recenter, "smoothing": smoothing,
        "seed": options.seed,
    }  # fmt: skip


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
