"""The parser of every command: argparse, with one-line errors that say what was probably meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import NoReturn

from rewrite.suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors name the flag, command or choice that is closest."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and one line with what was probably meant; exit with 2."""
        super().error(message + self._hint(message))

    def _hint(self, message: str) -> str:
        if found := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            return did_you_mean(found[1], self._flags())
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            return did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        return ""

    def _flags(self) -> Iterable[str]:
        """Yield the flags of this parser and of its commands: an unknown flag may be of either."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._option_string_actions
