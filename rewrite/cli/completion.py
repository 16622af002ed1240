"""The command `rewrite completion`: print the script that makes a shell complete `rewrite`."""

from __future__ import annotations

import argparse
from typing import Any

from rewrite.cli.common import OK
from rewrite.errors import OptionError

# zsh completes once `compinit` ran; a plain `.zshrc` does not run it.
_FIRST = {
    "bash": "",
    "zsh": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }\n",
    "fish": "",
}


def add_parsers(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print the completion of a shell",
        description='bash, zsh: eval "$(rewrite completion bash)"; '
        "fish: rewrite completion fish | source",
    )
    parser.add_argument("shell", choices=list(_FIRST))
    parser.set_defaults(run=_run_completion)


def _run_completion(options: argparse.Namespace) -> int:
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise OptionError("completion needs argcomplete; pip install argcomplete") from error
    print(_FIRST[options.shell] + shellcode(["rewrite"], shell=options.shell))
    return OK
