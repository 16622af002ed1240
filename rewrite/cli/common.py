"""Helpers of all commands: exit codes, MODEL arguments, example inputs, reports, the console."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rewrite.errors import OptionError, one_line, system_reason

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


def written_reports(options: argparse.Namespace) -> Iterable[tuple[str, str | None]]:
    """Yield the flag and the value of each report that a command may be asked to write."""
    for name in ("report", "html", "node_data"):
        yield f"--{name.replace('_', '-')}", getattr(options, name, None)


def check_places(options: argparse.Namespace) -> None:
    """Raise before any work when a file that is written would take the place of something else.

    Raises:
        OptionError: it has no name, is a file that is read, or exists as something else than an
            earlier report, without --force; two files that are written are one; or a picture cannot
            be drawn.
    """
    from rewrite.files import is_folder, is_there
    from rewrite.files.places import (
        check_distinct,
        check_name,
        check_not_inside,
        check_not_read,
        check_replaceable,
    )

    if getattr(options, "plot", None):
        from rewrite.files.figure import check_plot

        check_plot(Path(options.plot))
    replays = options.command == "apply-map"
    made = [(f"--{name}", getattr(options, name, None)) for name in ("output", "onnx", "repro")]
    reports = [] if replays else [*written_reports(options)]
    reports.append(("--plot", getattr(options, "plot", None)))
    own = _own(options)
    folders = ["--repro", *(["--output"] if is_folder(own) else [])]
    for flag, name in (*made, *reports):
        check_name(flag, name, folder=flag in folders)
    graph = options.output if options.command == "export" else getattr(options, "onnx", None)
    beside = [("the graph (for weights beside it)", f"{graph}.data")] if graph else []
    check_distinct([*beside, *made, *reports])
    read = [getattr(options, name, None) for name in (*_READ, *(["report"] if replays else []))]
    # A model may be replaced by what became of it, under --force; nothing else that is read.
    others = [name for name in read if name != own]
    for flag, name in made:
        check_not_read(flag, name, others)
    for flag, name in reports:
        check_not_read(flag, name, read)
        if name and is_there(name) and Path(name).is_file():
            check_not_inside(flag, name, read)
            if not getattr(options, "force", False):
                check_replaceable(flag, name)


def _own(options: argparse.Namespace) -> str:
    """Return what the command is about: what `-o` is made of."""
    names = ("checkpoint", "student", "model")
    return next((getattr(options, name) for name in names if hasattr(options, name)), "")


def check_report(options: argparse.Namespace) -> None:
    """Raise CheckpointError when a report that is asked for cannot be written; touch nothing."""
    from rewrite.files import check_writable

    for _, name in written_reports(options):
        if name is not None:
            check_writable(name)


_MODELS = ("model", "other", "student", "teacher", "before", "checkpoint")
_DATA = ("input", "calibration", "data", "recover")
_READ = (*_MODELS, *_DATA)
"""The options that name the files a command reads."""

_FILES = (".pt", ".pth", ".pt2", ".ckpt", ".safetensors")
"""Suffixes of model files; any other reference is the name of a library's model."""

_SMALL_GRAPH = 64 << 20
"""Graphs up to this many bytes are read twice: once to vet them, once with their weights."""


def check_graph_name(flag: str, name: str) -> None:
    """Raise OptionError unless the name of an ONNX graph to write ends in .onnx."""
    if not is_onnx(name):
        raise OptionError(f"{flag} {name}: a graph is a .onnx file")
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise OptionError(f"{flag} {printable(name)}: a graph's name is text in UTF-8; rename it")


def is_onnx(name: str) -> bool:
    """Return whether a reference names an ONNX graph (.onnx, .ort) rather than a MODEL."""
    return Path(name).suffix.lower() in (".onnx", ".ort")


def vet_files(options: argparse.Namespace) -> None:
    """Check the input files of a command before torch is imported, as far as that needs none.

    Raises:
        CheckpointError: it is no checkpoint, or one that may not be opened.
        OptionError: it is a file of inputs or data that cannot be read.
        VerificationError: it is an ONNX file that cannot be read.
    """
    from rewrite.files import is_folder, is_there, no_file

    for name in _READ:
        value = getattr(options, name, None)
        if not isinstance(value, str) or "\0" in value:
            continue
        if is_folder(value):
            if name in _MODELS:
                _vet_folder(Path(value))
            continue
        if name in _MODELS and Path(value).suffix in _FILES and not os.path.lexists(value):
            from rewrite.checkpoint.closest import closest_reference

            raise OptionError(f"{value}: no such file{closest_reference(value)}")
        if wrong := no_file(value):
            raise OptionError(f"{value}: {wrong}")
        if is_there(value) and Path(value).is_file():
            (_vet_data if name in _DATA else _vet_model)(options, value)


def _vet_model(options: argparse.Namespace, path: str) -> None:
    if options.command == "verify" and is_onnx(path):
        if Path(path).stat().st_size < _SMALL_GRAPH:
            from rewrite.onnx.runtime import try_file

            try_file(path, options.input)
        return
    from rewrite.checkpoint.vetting.vet import vet

    # Of a checkpoint that a report is applied to only the tensors are opened.
    report = "the report" if options.command == "apply-map" else None
    vet(
        path,
        factory=getattr(options, "factory", report),
        trust=getattr(options, "trust", ()),
        key=getattr(options, "key", None),
        # Of two models that are verified one may be a state dict, which the other one builds.
        state=options.command == "verify",
    )


def _vet_folder(path: Path) -> None:
    """Vet a checkpoint folder; what any other folder is, its command says."""
    from rewrite.checkpoint.vetting.vet import vet_safetensors
    from rewrite.hub.form import CONFIG, read_form

    if (path / CONFIG).is_file():
        for shard in read_form(path).shards:
            vet_safetensors(path / shard)


def _vet_data(_: argparse.Namespace, path: str) -> None:
    """Vet a file of inputs or data as the reader of its suffix will read it."""
    from rewrite.checkpoint.vetting.vet import vet_pickle, vet_safetensors

    suffix = Path(path).suffix.lower()
    if suffix in (".pt", ".pth"):
        vet_pickle(path)
    elif suffix == ".safetensors":
        vet_safetensors(path)
    elif suffix in (".npy", ".npz"):
        from rewrite.runtime.stored.array_files import check_arrays

        try:
            check_arrays(Path(path))
        except (OSError, ValueError, TypeError, MemoryError, SyntaxError) as error:
            reason = system_reason(error) if isinstance(error, OSError) else one_line(error)
            raise OptionError(f"{path}: cannot be read as arrays: {reason}") from error
