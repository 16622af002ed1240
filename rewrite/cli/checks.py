"""What a command checks of the files that it reads and writes, before any work.

Nothing here imports torch: what is refused costs milliseconds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from rewrite.cli.common import printable
from rewrite.errors import OptionError, one_line, system_reason


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
