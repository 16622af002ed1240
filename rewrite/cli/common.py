"""Helpers of all commands: exit codes, MODEL arguments, example inputs, reports, the console."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from rewrite.runtime.infer_inputs import Inferred


OK, FAILED, USAGE, NOTHING = 0, 1, 2, 3

INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C ended."""


MODEL_HELP = (
    "a checkpoint (.pt, .pth, .pt2, .safetensors), torchvision:NAME, timm:NAME, "
    "or package.module:factory"
)


class Reported(Protocol):
    """What a command found: printed as tables, written as JSON."""

    def to_json(self) -> str:
        """Return it as JSON."""
        ...

    def tables(self, *, verbose: bool = False) -> Iterable[Any]:
        """Return what rich prints of it; with `verbose` also rows that are alike."""
        ...


def complain(message: object, code: int) -> int:
    """Print an error message on standard error, and return `code`."""
    print(f"rewrite: {printable(message)}", file=sys.stderr)
    return code


def printable(text: object) -> str:
    """Return text that was read from a file, with its control characters escaped."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that opens a MODEL."""
    parser.add_argument(
        "--factory",
        metavar="PKG.MOD:CALLABLE",
        help="builds the model of a state dict; json keyword arguments in parentheses",
    )
    parser.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="allow the classes of a package in a pickled checkpoint (repeatable)",
    )
    parser.add_argument(
        "--key", metavar="NAME", help="where in a checkpoint the state dict is, as generator"
    )
    parser.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help="what to take off the keys of a state dict (by itself: what makes all keys fit)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--input",
        metavar="SHAPE|FILE",
        help="1x3x224x224[,...] or a .npz/.npy/.pt file: what the model is run on",
    )
    parser.add_argument("--report", metavar="OUT.json", help="write the report as JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--verbose", action="store_true", help="print every row, also those alike")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_page_argument(parser: argparse.ArgumentParser) -> None:
    """Add --html, for a command whose report can be an HTML page."""
    parser.add_argument("--html", metavar="OUT.html", help="write the report as one HTML page")


def load_model(options: argparse.Namespace, reference: str, *, factory: bool = True) -> nn.Module:
    """Open a MODEL reference with the command's --factory, --trust, --key and --strip-prefix.

    With `factory=False`, a file that holds a whole model is opened as such and --factory ignored.
    """
    from rewrite.checkpoint.load import load

    def note(text: str) -> None:
        if not options.quiet:
            print(f"rewrite: {reference}: {printable(text)}", file=sys.stderr)

    return load(
        reference,
        factory=options.factory if factory else None,
        trust=options.trust,
        key=options.key,
        strip_prefix=options.strip_prefix,
        seed=options.seed,
        note=note,
    )


def save_model(options: argparse.Namespace, reference: str, model: nn.Module, output: Path) -> None:
    """Save a converted model in the form of its original: a state dict, or a whole model.

    Args:
        options: of the command; --factory and --key say how the original was opened.
        reference: the MODEL argument that names the original.
        model: the converted model.
        output: the file; its suffix decides the format.
    """
    from rewrite.checkpoint.load import holds_state, save, save_state

    is_state = options.factory is not None and holds_state(reference, options.key)
    (save_state if is_state else save)(model, output, overwrite=options.force)
    if is_state and not options.quiet:
        print(f"rewrite: {output}: a state dict, as {reference} is", file=sys.stderr)


def example_inputs(options: argparse.Namespace, model: nn.Module) -> tuple[Any, ...] | None:
    """Return the inputs that --input names (a file, or shapes to draw), None without --input."""
    if options.input is None:
        return None
    from rewrite.runtime.stored.input_files import load_inputs, parse_shapes

    if Path(options.input).suffix in (".npz", ".npy", ".pt", ".pth"):
        from rewrite.checkpoint.pickles.unpickle import load_pickle

        return load_inputs(options.input, load_pickle)
    return parse_shapes(options.input, model, options.seed)


def calibration_data(reference: str, model: nn.Module, **form: Any) -> Iterable[Any]:
    """Return the batches that `reference` names; files are opened with a checkpoint's limits.

    Args:
        reference: a file of arrays, a folder of images, or a factory `module:function`.
        model: what the batches are for.
        form: size, count and preprocessing, as `open_calibration` takes them.

    Raises:
        OptionError: the reference names no usable data.
        CheckpointError: the file may run code when it is opened, or is damaged.
    """
    from rewrite.calibration.data import open_calibration
    from rewrite.checkpoint.pickles.unpickle import load_pickle

    return open_calibration(reference, model, read=load_pickle, **form)


def or_inferred(
    options: argparse.Namespace, model: nn.Module, inputs: Any, *, small: bool = False
) -> Inferred:
    """Return the given inputs, or else random ones of an inferred shape, if one can be inferred.

    With `small`, inferred images are small ones, unless the model records its image size.
    """
    from rewrite.runtime.infer_inputs import Inferred, infer_inputs, recorded_size

    if inputs is not None:
        return Inferred(inputs)
    return infer_inputs(model, options.seed, quick=small and recorded_size(model) is None)


def write_report(options: argparse.Namespace, found: Reported, page: str | None = None) -> None:
    """Print a report, or write it as JSON and as an HTML page, as the options say."""
    from rewrite.files import write_bytes

    text = _with_provenance(options, found.to_json()) if options.report or options.json else ""
    if options.report:
        write_bytes(options.report, text.encode())
    if page is not None and options.html:
        # Names of files may hold bytes that are no text.
        write_bytes(options.html, page.encode(errors="backslashreplace"))
    if options.json:
        print(text.rstrip())
    elif not options.quiet:
        screen = console()
        for shown in found.tables(verbose=options.verbose):
            screen.print(shown)


def _with_provenance(options: argparse.Namespace, report: str) -> str:
    """Return a report's JSON with the command line, the files that were read, and the versions."""
    files = [getattr(options, name, None) for name in ("model", "other", "input")]
    found = {**json.loads(report), "provenance": own_provenance(*files)}
    return json.dumps(found, indent=2) + "\n"


def own_provenance(*files: str | None) -> dict[str, str]:
    """Return the command line, the hashes of the files that were read, and the versions."""
    from rewrite.provenance import own_command, provenance

    return provenance([name for name in files if name is not None], own_command())


def console() -> Console:
    """Return the console that everything is printed on; wide where it is no terminal."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 140
    return Console(width=wide, highlight=False, markup=False)


def default_output(reference: str, became: str) -> Path:
    """Return where what becomes of a MODEL goes without -o: beside its file, or here for a name.

    Args:
        reference: the MODEL argument.
        became: what became of it, in the name: "rewritten".
    """
    from rewrite.files import is_there

    place = Path(reference)
    if is_there(place):
        # Of a state dict a state dict is written, in its own form.
        own = place.suffix == ".safetensors"
        return place.with_name(f"{place.stem}.{became}{'.safetensors' if own else '.pt'}")
    # A name of a library, or a path that leads nowhere, which is said when it is opened.
    name = reference.partition("(")[0].rpartition(":")[2].rstrip("/")
    return Path(f"{name.rpartition('/')[2]}.{became}.pt")
