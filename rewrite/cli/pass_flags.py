"""Flags of passes, in order: `--bn-to-gn --num-groups 16`, `--pass 'bn-to-gn{num_groups=16}'`.

A flag is known by its entry point's name alone; only the passes that a command names are imported,
and only their options become flags. An option belongs to the nearest pass before it that has such a
field, else to the first one after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite import registry
from rewrite.errors import OptionError

if TYPE_CHECKING:
    from rewrite.protocol import Pass


@dataclass
class PassFlags:
    """The pass flags of one command line, in order."""

    events: list[tuple[str, Any]] = field(default_factory=list)

    def build(self, seed: int) -> list[Pass]:
        """Return the passes with their options.

        Raises:
            OptionError: no chosen pass has the option, or its value does not fit.
        """
        drafts: list[tuple[type[Pass] | Pass, dict[str, Any]]] = []
        early: list[tuple[str, Any]] = []
        for kind, value in self.events:
            if kind == "pass":
                drafts.append((value, {}))
                early = [
                    (name, option) for name, option in early if not _give(drafts, name, option)
                ]
            elif not _give(drafts, kind, value):
                early.append((kind, value))
        if early:
            name = early[0][0].replace("_", "-")
            raise OptionError(f"--{name}: no pass on this command line has such an option")
        return [_finished(draft, given, seed) for draft, given in drafts]


def _give(drafts: list[tuple[type[Pass] | Pass, dict[str, Any]]], name: str, value: Any) -> bool:
    for draft, given in reversed(drafts):
        if any(field.name == name and field.init for field in fields(draft)):
            given[name] = value
            return True
    return False


def _finished(draft: type[Pass] | Pass, given: dict[str, Any], seed: int) -> Pass:
    if not isinstance(draft, type):
        return replace(draft, **given) if given else draft
    if any(field.name == "seed" for field in fields(draft)):
        given.setdefault("seed", seed)
    return draft(**given)


def add_pass_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add a flag for each installed pass, and the options of those that `argv` names."""
    parser.set_defaults(passes=None)
    group = parser.add_argument_group("passes, applied in the order written (see `rewrite passes`)")
    group.add_argument("--pass", dest="passes", metavar="SPEC", action=_SpecAction,
                       help="a pass with options: 'bn-to-gn{num_groups=16}'")  # fmt: skip
    taken: set[str] = {option for action in parser._actions for option in action.option_strings}
    named = {token.partition("=")[0] for token in argv}
    for name in registry.entries():
        flag = f"--{name}"
        if flag not in named:
            group.add_argument(flag, dest="passes", action=_PassAction, nargs=0, const=name)
            continue
        kind = registry.pass_class(name)
        metavar = getattr(kind, "flag_value", None)
        group.add_argument(flag, dest="passes", action=_PassAction, const=name,
                           nargs=0 if metavar is None else None, metavar=metavar)  # fmt: skip
        for option in registry.options(kind):
            if option.flag in taken:
                continue
            taken.add(option.flag)
            group.add_argument(option.flag, dest="passes", action=_OptionAction, const=option,
                               nargs=0 if option.kind is bool else None,
                               metavar=option.name.upper() if option.kind is not bool else None,
                               help=option.help or None)  # fmt: skip


def _flags(namespace: argparse.Namespace) -> PassFlags:
    if namespace.passes is None:
        namespace.passes = PassFlags()
    found: PassFlags = namespace.passes
    return found


class _PassAction(argparse.Action):
    """Choose a pass; collect the values of a flag that takes several (`--reinit`)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        kind = registry.pass_class(str(self.const))
        flags = _flags(namespace)
        if self.nargs == 0:
            flags.events.append(("pass", kind))
            return
        texts = getattr(namespace, f"_{self.const}", [])
        texts.append(values)
        setattr(namespace, f"_{self.const}", texts)
        try:
            built = kind.from_flag(texts)
        except OptionError as error:
            if Path(values).exists():
                raise OptionError(
                    f"--{self.const} takes a {self.metavar}, and {values} is a file or folder: "
                    f"write --{self.const} {self.metavar} {values}"
                ) from error
            raise
        if len(texts) > 1:
            index = next(
                i for i, (key, value) in enumerate(flags.events)
                if key == "pass" and isinstance(value, kind)
            )  # fmt: skip
            flags.events[index] = ("pass", built)
        else:
            flags.events.append(("pass", built))


class _SpecAction(argparse.Action):
    """Choose a pass by its text form."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        _flags(namespace).events.append(("pass", registry.parse(values)))


class _OptionAction(argparse.Action):
    """Set an option of a chosen pass."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        option: registry.Option = self.const
        value = True if option.kind is bool else option.parse(str(values))
        _flags(namespace).events.append((option.name, value))
