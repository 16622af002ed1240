"""The command line: arguments in, text and exit codes out. torch is imported only to do work.

Exit codes: 0 done and verified; 1 a contract or a verification failed; 2 wrong usage or unreadable
input; 3 nothing to rewrite.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite import registry
from rewrite.cli_passes import PassFlags, add_pass_flags
from rewrite.errors import OptionError, PassError, RewriteError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from rewrite.onnx_report import OnnxVerification
    from rewrite.pipeline import Result
    from rewrite.protocol import Pass

OK, FAILED, USAGE, NOTHING = 0, 1, 2, 3

# Subcommands that live in modules of their own: each has `add_parsers(subparsers)`, and the parser
# it adds sets `run`.
_MORE_COMMANDS = ("rewrite.cli_verify", "rewrite.cli_keymap")

_REFERENCE = (
    "a checkpoint (.pt, .pth, .pt2, .safetensors), torchvision:NAME, timm:NAME, "
    "or package.module:factory"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _rare_collection():
            options = _parser(argv).parse_args(argv)
            code: int = options.run(options)
    except PassError as error:
        return _complain(error, FAILED)
    except RewriteError as error:
        return _complain(error, USAGE)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was written", USAGE)
    return code


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Look for garbage seldom: imports make a million objects that stay, a tenth of a command."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _complain(message: object, code: int) -> int:
    print(f"rewrite: {message}", file=sys.stderr)
    return code


# -- arguments --------------------------------------------------------------------------------


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rewrite",
        description="Rewrite trained PyTorch models, prove the result, and export it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands, argv)
    _add_inspect(commands)
    listing = commands.add_parser("passes", help="list the passes, their options and contracts")
    listing.set_defaults(run=_run_passes)
    for name in _MORE_COMMANDS:
        importlib.import_module(name).add_parsers(commands)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that opens a MODEL."""
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
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument(
        "--input",
        metavar="SHAPE|FILE",
        help="1x3x224x224[,...] or a .npz/.npy/.pt file: what the model is run on",
    )
    parser.add_argument("--report", metavar="OUT.json", help="write the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_convert(commands: Any, argv: Sequence[str]) -> None:
    parser = commands.add_parser(
        "convert",
        help="apply passes to a model and save the result",
        description="Apply passes in the order of their flags, verify each, save the result.",
    )
    parser.add_argument("model", metavar="MODEL", help=_REFERENCE)
    parser.add_argument("-o", "--output", metavar="OUT.pt", help="default: MODEL.rewritten.pt")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="rewrite only sites whose qualified name matches (repeatable)",
    )
    parser.add_argument(
        "--skip",
        metavar="PATTERN",
        action="append",
        default=[],
        help="leave sites alone whose qualified name matches (repeatable)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would change")
    parser.add_argument("--allow-noop", action="store_true", help="exit 0 if nothing is to rewrite")
    parser.add_argument("--no-verify", action="store_true", help="do not run the models")
    parser.add_argument("--calibration", metavar="DATA",
                        help="unlabelled data for passes that fit: a folder of images, a file, or "
                        "package.module:factory")  # fmt: skip
    parser.add_argument(
        "--size", type=int, help="side of calibration images (default: the model's)"
    )
    parser.add_argument("--mean", metavar="R,G,B", help="subtracted from calibration images")
    parser.add_argument("--std", metavar="R,G,B", help="calibration images are divided by it")
    parser.add_argument("--onnx", metavar="OUT.onnx", help="export and verify the result as well")
    add_model_arguments(parser)
    if argv[:1] == ["convert"]:
        add_pass_flags(parser, argv[1:])
    parser.set_defaults(run=_run_convert)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect", help="show what is inside a model, and what passes would find"
    )
    parser.add_argument("model", metavar="MODEL", help=_REFERENCE)
    parser.add_argument("--signal", action="store_true",
                        help="measure how activations and gradients propagate")  # fmt: skip
    parser.add_argument("--plot", metavar="OUT.png|OUT.svg", help="with --signal: draw it")
    parser.add_argument("--before", metavar="MODEL",
                        help="with --plot: draw this model in the same picture")  # fmt: skip
    add_model_arguments(parser)
    parser.set_defaults(run=_run_inspect)


# -- commands ---------------------------------------------------------------------------------


def _run_convert(options: argparse.Namespace) -> int:
    flags: PassFlags = options.passes or PassFlags()
    chosen = flags.build(options.seed)
    if not chosen:
        names = ", ".join(f"--{name}" for name in registry.entries())
        raise OptionError(f"no pass given; choose from {names}")
    from rewrite.launch import process_group

    with process_group() as rank:
        options.quiet = options.quiet or rank > 0
        return _convert(options, chosen, first=rank == 0)


def _convert(options: argparse.Namespace, chosen: Sequence[Pass], *, first: bool) -> int:
    """Convert, and, in the first of several processes, write."""
    output = _output(options)
    from rewrite.files import check_writable

    writes = first and not options.dry_run
    if not first:
        options.report = None
    for path in (output, options.report, options.onnx) if writes else (options.report,):
        if path is not None:
            check_writable(path, overwrite=options.force or path == options.report)

    from rewrite.pipeline import convert
    from rewrite.progress import Steps

    with Steps(enabled=not options.quiet) as progress:
        progress("loading")
        model = load_model(options, options.model)
        inputs = example_inputs(options, model)
        result = convert(
            model, chosen, example_inputs=inputs,
            calibration=_calibration(options, model), only=options.only, skip=options.skip,
            verify=not (options.no_verify or options.dry_run), seed=options.seed, progress=progress,
            consume=True,
        )  # fmt: skip
        code = _judge(result.report, len(chosen), options)
        del model
        exported = None
        if code == OK and writes and result.report.changes:
            from rewrite.checkpoint import save

            if options.onnx:
                progress("exporting")
                exported = _export(options, result, inputs)
            progress("saving")
            save(result.model, output, overwrite=options.force)
    _finish(options, result.report)
    if code == OK and not options.quiet:
        print("nothing written (--dry-run)" if options.dry_run else f"wrote {output}")
    if exported is not None:
        if not options.quiet:
            for item in exported.tables():
                console().print(item)
        if not exported.ok:
            return _complain(f"{options.onnx}: does not agree with the model", FAILED)
    return code


def _output(options: argparse.Namespace) -> Path:
    if options.output:
        return Path(options.output)
    reference = Path(options.model)
    if reference.exists():
        return reference.with_name(f"{reference.stem}.rewritten.pt")
    return Path(options.model.rpartition(":")[2].split("(")[0] + ".rewritten.pt")


def _judge(report: Any, passes: int, options: argparse.Namespace) -> int:
    """Return the exit code of a conversion, and say on standard error what is wrong with it."""
    if not report.ok:
        return _complain("the result breaks its contract; nothing was written", FAILED)
    if not report.changes:
        if options.allow_noop:
            return OK
        return _complain("nothing to rewrite; nothing was written", NOTHING)
    idle = [item.spec for item in report.passes if not item.changes]
    if idle and passes > 1 and not options.allow_noop:
        raise OptionError(
            f"{', '.join(idle)} found nothing to rewrite beside the other passes; nothing was "
            "written (--allow-noop accepts that)"
        )
    return OK


def _calibration(options: argparse.Namespace, model: nn.Module) -> Any:
    if options.calibration is None:
        return None
    from rewrite.calibration_data import open_calibration

    return open_calibration(
        options.calibration, model, size=options.size,
        mean=_numbers("--mean", options.mean), std=_numbers("--std", options.std),
    )  # fmt: skip


def _numbers(flag: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{flag} {text}: write numbers, as 0.485,0.456,0.406") from None


def _export(
    options: argparse.Namespace, result: Result[nn.Module], inputs: tuple[Any, ...] | None
) -> OnnxVerification:
    from rewrite.onnx import export
    from rewrite.tree import copy_model

    passes = result.report.passes
    metadata = {
        "source": str(options.model),
        "passes": " ".join(item.spec for item in passes),
        "contract": " ".join(item.contract for item in passes),
    }
    return export(
        copy_model(result.model).eval(), options.onnx, example_inputs=inputs, metadata=metadata,
        overwrite=options.force, seed=options.seed,
    )  # fmt: skip


def _run_inspect(options: argparse.Namespace) -> int:
    from rewrite.files import check_writable
    from rewrite.inspection import inspect_model

    if options.report:
        check_writable(options.report)
    model = load_model(options, options.model)
    inputs = example_inputs(options, model)
    if options.signal:
        from rewrite.cli_signal import run_signal

        return run_signal(options, model, inputs)
    _finish(options, inspect_model(model, inputs))
    return OK


def _run_passes(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    table = Table("pass", "contract", "what it does", "options", box=None, pad_edge=False)
    for name, entry in registry.entries().items():
        kind = registry.pass_class(name)
        summary = (kind.__doc__ or "").strip().partition("\n")[0]
        given = "\n".join(
            f"{option.flag} ({option.kind.__name__}, default {option.default}): {option.help}"
            for option in registry.options(kind)
        )
        package = entry.dist.name if entry.dist is not None else entry.value
        shown = name if package == "rewrite" else f"{name} [from {package}]"
        table.add_row(*map(Text, (shown, str(kind.contract), summary, given)))
    console().print(table)
    return OK


# -- shared -----------------------------------------------------------------------------------


def load_model(options: argparse.Namespace, reference: str) -> nn.Module:
    """Open a MODEL reference with the command's --factory and --trust."""
    from rewrite.checkpoint import load

    return load(reference, factory=options.factory, trust=options.trust)


def example_inputs(options: argparse.Namespace, model: nn.Module) -> tuple[Any, ...] | None:
    """Return what --input describes, or None."""
    if options.input is None:
        return None
    from rewrite.inputs import load_inputs, parse_shapes

    if Path(options.input).suffix in (".npz", ".npy", ".pt", ".pth"):
        return load_inputs(options.input)
    return parse_shapes(options.input, model, options.seed)


def _finish(options: argparse.Namespace, report: Any) -> None:
    """Print a report's tables and write its JSON, as the options say."""
    if options.report:
        from rewrite.files import write_bytes

        write_bytes(options.report, report.to_json().encode())
    if not options.quiet:
        screen = console()
        for item in report.tables():
            screen.print(item)


def console() -> Console:
    """Return the console that everything is printed on; wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)
