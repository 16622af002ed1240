"""Passes found through the entry-point group `rewrite.passes`, and their text form.

    [project.entry-points."rewrite.passes"]
    my-pass = "my_package.my_pass:MyPass"

A pass and its options are one text, `bn-to-gn{num_groups=16,strict=true}`, and back.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rewrite.errors import OptionError
from rewrite.text.suggest import did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from rewrite.protocol import Pass


GROUP = "rewrite.passes"


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass, read off its dataclass field.

    Attributes:
        name: the field's name.
        kind: bool, int, float or str: what a text value is parsed as.
        optional: whether None is allowed.
        default: the field's default.
        help: one line, from the field's metadata.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The option as a command-line flag."""
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """Return the value that `text` means.

        Raises:
            OptionError: `text` is no value of this kind.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.kind is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            raise OptionError(f"{self.name}: {text!r} is neither true nor false")
        try:
            return self.kind(text)
        except ValueError:
            raise OptionError(f"{self.name}: {text!r} is not {_article(self.kind)}") from None


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number"}.get(kind, f"a {kind.__name__}")


def entries() -> Mapping[str, EntryPoint]:
    """Return the installed passes by name; none of them is imported."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def pass_class(name: str) -> type[Pass]:
    """Import and return the pass called `name`.

    Raises:
        OptionError: no such pass, or its package cannot be imported or holds no pass.
    """
    from rewrite.protocol import Pass

    known = entries()
    if name not in known:
        hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
        raise OptionError(
            f"{name}: no such pass{hint} (one that was just registered needs `pip install -e .`)"
        )
    try:
        loaded = known[name].load()
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{name}: {known[name].value} cannot be imported: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise OptionError(f"{name}: {known[name].value} is no subclass of rewrite.Pass")
    return loaded


def options(kind: type[Pass]) -> Iterator[Option]:
    """Yield the options of a pass that a text can set."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        hint, optional = _value_type(hints[field.name])
        if hint is None:
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        yield Option(field.name, hint, optional, default, field.metadata.get("help", ""))


def _value_type(hint: Any) -> tuple[type | None, bool]:
    """Return the type to parse a text with, and whether None is allowed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        found = _value_type(inner[0])[0] if len(inner) == 1 else None
        return found, len(inner) < len(typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return str, False
    return (hint if hint in (bool, int, float, str) else None), False


def parse(text: str) -> Pass:
    """Return the pass that a text like `bn-to-gn{num_groups=16}` describes.

    Raises:
        OptionError: an unknown pass or option, or a value that does not fit.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\{(.*)\})?\s*", text, re.DOTALL)
    if match is None:
        raise OptionError(f"{text!r} is no pass; write name or name{{option=value,...}}")
    kind = pass_class(match[1])
    known = {option.name: option for option in options(kind)}
    values: dict[str, Any] = {}
    for setting in _split(match[2] or ""):
        key, sign, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if key not in known or not sign:
            names = ", ".join(known) or "none"
            raise OptionError(
                f"{match[1]}: {setting.strip()!r} is no option=value; options: {names}"
            )
        values[key] = known[key].parse(_unquote(value.strip()))
    return kind(**values)


def _split(text: str) -> list[str]:
    parts = re.findall(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+', text)
    return [part for part in parts if part.strip()]


def _unquote(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def as_passes(given: object) -> list[Pass]:
    """Return passes from whatever a user may give for them.

    Args:
        given: a pass, its class, its text form, or any iterable of these.

    Raises:
        OptionError: nothing is given, something that is no pass, or an option that does not fit.
    """
    from rewrite.protocol import Pass

    if isinstance(given, Iterable) and not isinstance(given, str | Mapping | Pass | type):
        passes = [_as_pass(each) for each in given]
    else:
        passes = [_as_pass(given)]
    if not passes:
        raise OptionError("no pass given; see `rewrite passes`")
    return passes


def _as_pass(given: object) -> Pass:
    from rewrite.protocol import Pass

    if isinstance(given, Pass):
        return given
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, type) and issubclass(given, Pass):
        try:
            return given()
        except TypeError as error:
            raise OptionError(f"{given.__name__}: {error}; pass an instance of it") from None
    raise OptionError(
        f"{given!r} is no pass; give a pass, its class or its name (see `rewrite passes`)"
    )


def spec(pass_: Pass) -> str:
    """Return the text that `parse` turns into an equal pass; defaults are left out."""
    given = []
    for option in options(type(pass_)):
        value = getattr(pass_, option.name)
        if value == option.default:
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if isinstance(value, str) and not re.fullmatch(r"[\w.:/*-]+", value):
            text = json.dumps(value)
        given.append(f"{option.name}={text}")
    return f"{pass_.name}{{{','.join(given)}}}" if given else pass_.name
