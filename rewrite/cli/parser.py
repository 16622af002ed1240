"""The parser of every command: one-line errors with suggestions, and a project's defaults.

Defaults stand in `[tool.rewrite]` of the nearest `pyproject.toml`, for CI:

    [tool.rewrite]
    seed = 1                  # for every command that has the option

    [tool.rewrite.verify]
    contract = "exact-in-eval"
    input = "1x3x224x224"

A key is the name of a flag without its dashes; the command line overrides it.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rewrite import registry
from rewrite.errors import OptionError, one_line
from rewrite.text.suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors suggest the closest flag, command or choice."""

    given: Sequence[str] = ()
    """The words of the command line, of which an error tells what was meant."""

    def error(self, message: str) -> NoReturn:
        """Print the error and a suggestion, or where help is, in one line; exit with 2."""
        hint = self._hint(message)
        place = self.prog
        if not hint and place == "rewrite" and self.given[:1] and self.given[0][:1] != "-":
            place = f"rewrite {self.given[0]}"
        help_ = "" if hint else f"; {place} --help shows what it takes"
        self.exit(2, f"{self.prog}: error: {message}{hint}{help_}\n")

    def _hint(self, message: str) -> str:
        if found := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            return self._hint_at_flag(found[1])
        if message.startswith("unrecognized arguments:"):
            flags = set(self._flags())
            meant = [f"--{word}" for word in self.given if f"--{word}" in flags]
            return f"; did you mean {' '.join(meant)}?" if meant else ""
        if "COMMAND" in message and self.given[0][2:] in registry.entries():
            return f"; did you mean rewrite convert {' '.join(self.given)}?"
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            return did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        return ""

    def _hint_at_flag(self, flag: str) -> str:
        """Suggest flags close to an unknown one, or name the command or pass that has it."""
        commands = self._commands()
        used = next((word for word in self.given if word in commands), None)
        own = self._flags() if used is None else commands[used]._option_string_actions
        having = [
            name for name, parser in commands.items() if flag in parser._option_string_actions
        ]
        if having:
            return f"; it is a flag of rewrite {', '.join(having)}"
        passes = _passes_with(flag) if used == "convert" else []
        if passes:
            return f"; it is an option of {' and '.join(passes)}, and stands behind it"
        return did_you_mean(flag, own)

    def _commands(self) -> Mapping[str, argparse.ArgumentParser]:
        found: dict[str, argparse.ArgumentParser] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= action.choices
        return found

    def _flags(self) -> Iterable[str]:
        """Yield the flags of this parser and of its commands: an unknown flag may be of either."""
        yield from self._option_string_actions
        for parser in self._commands().values():
            yield from parser._option_string_actions


def _passes_with(flag: str) -> list[str]:
    """Return the flags of the passes that have an option of this flag."""
    return [
        f"--{name}"
        for name in registry.entries()
        if any(option.flag == flag for option in registry.options(registry.pass_class(name)))
    ]


def find_config(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the nearest `pyproject.toml` with a `[tool.rewrite]`, at or above a folder.

    Raises:
        OptionError: the nearest `pyproject.toml` is not valid TOML.
    """
    for place in (folder, *folder.parents):
        path = place / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            held = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise OptionError(f"{path}: cannot be read: {one_line(error)}") from error
        tools = held.get("tool")
        table = tools.get("rewrite") if isinstance(tools, dict) else None
        if not (table is None or isinstance(table, dict)):
            raise OptionError(f"{path}: tool.rewrite is no table; write [tool.rewrite]")
        return None if table is None else (path, table)
    return None


def apply_config(
    commands: Mapping[str, argparse.ArgumentParser], path: Path, table: Mapping[str, Any]
) -> None:
    """Set the values of `[tool.rewrite]` as the defaults of the commands.

    Raises:
        OptionError: an unknown command or option, or a value of another kind.
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            if key not in commands:
                hint = did_you_mean(key, commands)
                raise OptionError(f"{path}: [tool.rewrite.{key}] is no command{hint}")
            for name, inner in value.items():
                _set(commands[key], path, f"tool.rewrite.{key}", name, inner)
            continue
        having = [parser for parser in commands.values() if _action(parser, key) is not None]
        if not having:
            if key in commands:
                raise OptionError(f"{path}: {key} is a command; write [tool.rewrite.{key}]")
            known = {name for parser in commands.values() for name in _names(parser)}
            raise OptionError(f"{path}: tool.rewrite.{key} is no option{did_you_mean(key, known)}")
        for parser in having:
            _set(parser, path, "tool.rewrite", key, value)


_NAMES_CODE = frozenset(
    {"trust", "factory", "calibration", "data", "recover", "teacher", "before", "force"}
)
"""Options that import what they name, or replace files: a folder's file may not set them."""

_WRITES = frozenset({"output", "onnx", "report", "html", "plot", "node-data", "repro", "state"})
"""Options that say where something is written: a file may name places below its folder alone."""


def _set(parser: argparse.ArgumentParser, path: Path, where: str, key: str, value: Any) -> None:
    action = _action(parser, key)
    if action is None:
        hint = did_you_mean(key, _names(parser))
        raise OptionError(f"{path}: {where}.{key} is no option of {parser.prog}{hint}")
    if key in _NAMES_CODE:
        raise OptionError(
            f"{path}: {where}.{key}: a file may not say what code runs, or what"
            f" is replaced; pass --{key} yourself"
        )
    fits, wanted = _fits(action, value)
    if not fits:
        shown = json.dumps(value, default=str, ensure_ascii=False)
        raise OptionError(f"{path}: {where}.{key} = {shown} does not fit --{key}; write {wanted}")
    if key in _WRITES and not _is_below_here(value):
        raise OptionError(
            f"{path}: {where}.{key} = {json.dumps(value)}: a file may name places below the"
            f" current folder alone; pass --{key} yourself"
        )
    parser.set_defaults(**{action.dest: value})


def _is_below_here(place: str) -> bool:
    """Say whether a path is in the current folder, also where it goes through links."""
    here = Path.cwd().resolve()
    try:
        return (here / place).resolve().is_relative_to(here)
    except (OSError, ValueError, RuntimeError):
        return False


def _fits(action: argparse.Action, value: Any) -> tuple[bool, str]:
    """Return whether a configured value suits an option, and which values would."""
    if action.choices is not None:
        return value in action.choices, " or ".join(f'"{choice}"' for choice in action.choices)
    if isinstance(action.default, bool):
        return isinstance(value, bool), "true or false"
    if isinstance(action, argparse._AppendAction):
        fits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        return fits, 'a list of texts, ["..."]'
    if action.type in (int, float):
        kinds = (int,) if action.type is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool), "a number"
    return isinstance(value, str), 'a text, "..."'


def _action(parser: argparse.ArgumentParser, key: str) -> argparse.Action | None:
    action = parser._option_string_actions.get(f"--{key}")
    return None if action is None or action.dest in ("help", "passes") else action


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
