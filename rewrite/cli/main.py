"""The command line: arguments in, text and exit codes out. torch is imported only to do work.

Exit codes: 0 done and verified; 1 a contract or a verification failed; 2 wrong usage or unreadable
input; 3 nothing to rewrite; 130 interrupted, and nothing was written
(by `recover` that had begun to train: the best state).
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rewrite import __version__
from rewrite.cli import (
    apply_map,
    compare,
    completion,
    convert,
    export,
    inspect,
    passes,
    recover,
    verify,
)
from rewrite.cli.checks import (
    check_places,
    vet_files,
    written_reports,
)
from rewrite.cli.common import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    complain,
    printable,
)
from rewrite.cli.parser import Parser, apply_config, find_config
from rewrite.errors import OptionError, PassError, RewriteError, system_reason
from rewrite.memory import rare_collection


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    told = _Told()
    _escape_what_has_no_code()
    try:
        with rare_collection():
            if "_ARGCOMPLETE" in os.environ:
                complete(_parser(os.environ.get("COMP_LINE", "").split()[1:]))
            parser = _parser(argv)
            if not argv:
                parser.print_help(sys.stderr)
                return USAGE
            options = parser.parse_args(argv)
            if not -(1 << 63) <= getattr(options, "seed", 0) < 1 << 64:
                raise OptionError(f"--seed {options.seed}: a seed has at most 64 bits")
            _finish_interrupted(options)
            check_places(options)
            vet_files(options)
            # It logs a traceback of each input that does not fit, which becomes one line here.
            logging.getLogger("torch._subclasses.fake_tensor").disabled = True
            with _stopped_by_signals(told):
                code = _published(options)
    except RewriteError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            return complain(error, INTERRUPTED)
        if told.to_stop:
            # What the interrupt broke off inside of a library was taken for an error there.
            return complain(_INTERRUPTED, INTERRUPTED)
        return complain(error, FAILED if isinstance(error, PassError) else USAGE)
    except KeyboardInterrupt:
        return complain(_INTERRUPTED, INTERRUPTED)
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        return complain(f"{place}{system_reason(error)}", USAGE)
    return code


def _escape_what_has_no_code() -> None:
    """Escape characters that the encoding of standard output lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _published(options: argparse.Namespace) -> int:
    """Run a command, then publish its output files under their names: all of them, or none."""
    from rewrite.files import publication

    with publication() as files:
        try:
            code: int = options.run(options)
            if code == FAILED and options.command in _NOTHING_WRONG:
                files.keep([Path(name) for _, name in written_reports(options) if name])
            files.publish()
        except KeyboardInterrupt:
            # It waited while files got their names: too late to stop anything.
            if not files.written:
                raise
        if not getattr(options, "quiet", False) and not getattr(options, "json", False):
            for path in files.written:
                print(f"wrote {printable(path)}")
    return code


def _finish_interrupted(options: argparse.Namespace) -> None:
    """Finish publications that a killed command left half done, in the folders named here."""
    from rewrite.files.publishing import finish_interrupted

    named = [value for value in vars(options).values() if isinstance(value, str) and value]
    for folder in {Path(name).parent for name in named if "\0" not in name}:
        try:
            finished = finish_interrupted(folder)
        except OSError as error:
            finished = False
            complain(f"{folder}: an interrupted command left {error.filename}", USAGE)
        if finished and not getattr(options, "quiet", False):
            complain(f"{folder}: finished what an interrupted command had begun to write", OK)


_NOTHING_WRONG = ("convert", "export")
"""Commands that write no model when they fail; the reports say why."""


_INTERRUPTED = "interrupted; nothing was written"


class _Told:
    """A flag: whether a signal has asked the process to stop."""

    to_stop = False


@contextmanager
def _stopped_by_signals(told: _Told) -> Iterator[None]:
    """Turn SIGTERM and its like into an exception, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        told.to_stop = True
        raise KeyboardInterrupt

    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signals.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser(argv: Sequence[str]) -> Parser:
    parser = Parser(
        prog="rewrite",
        description="Rewrite trained PyTorch models, prove the result, and export it.",
    )
    parser.given = argv
    parser.add_argument("--version", action="version", version=f"rewrite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert.add_parsers(commands, argv)
    for command in (inspect, passes, verify, compare, recover, export, apply_map, completion):
        command.add_parsers(commands)
    for parser_ in commands.choices.values():
        known = {option for action in parser_._actions for option in action.option_strings}
        if "--force" not in known and known & {"--report", "--html"}:
            parser_.add_argument("--force", action="store_true", help="overwrite existing files")
    if (found := find_config(Path.cwd())) is not None:
        apply_config(commands.choices, *found)
    return parser


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell's request for completions, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)
