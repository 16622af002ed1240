"""What the names of a function hold at one line, and what they may hold behind a fork.

    h = self.norm(x)          the value
    if flag:
        h = self.other(x)     another value: from here on h may be the one or the other
    self.head(h)              what reads h is fed by both

A reader that absorbs a map may be fed by the value alone, so both have to be known of a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rewrite.observe.code.fields import Fields, merged


@dataclass(frozen=True)
class Other:
    """Another value that may stand in the place of the value that is followed.

    Attributes:
        place: the line that puts it there.
        given: the argument of the model that it is, or "".
        nothing: whether it may be None, which no layer takes.
    """

    place: str
    given: str = ""
    nothing: bool = False

    @property
    def is_value(self) -> bool:
        """Whether code of the model may have put a value there."""
        return not self.given and not self.nothing


class NotNone:
    """What is known of a parameter that holds the value: it is not None."""


@dataclass(frozen=True)
class Returned:
    """What a function returns.

    Attributes:
        held: whether it may return the value.
        fields: in which fields of what it returns.
        other: another value that it may return instead.
    """

    held: bool
    fields: Fields = None
    other: Other | None = None


@dataclass
class State:
    """What is known of the names of a function at one line.

    Attributes:
        names: those that may hold the value.
        of_name: per name, the fields in which an object holds it; None: it may be the value itself.
        known: per name, the constant that it is.
        others: per name, another value that it may hold.
    """

    names: set[str] = field(default_factory=set)
    of_name: dict[str, Fields] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Other] = field(default_factory=dict)

    def copy(self) -> State:
        """Return the same, to be changed alone."""
        return State(set(self.names), dict(self.of_name), dict(self.known), dict(self.others))


def behind(branches: Sequence[State]) -> State:
    """Return what is known where any of several branches may have been taken."""
    names = set[str]().union(*(branch.names for branch in branches))
    fields = merged([(branch.names, branch.of_name) for branch in branches])
    first = branches[0].known if branches else {}
    known = {
        name: value
        for name, value in first.items()
        if all(name in b.known and b.known[name] == value for b in branches)
    }
    return State(names, fields, known, _either(branch.others for branch in branches))


def either(*found: Other | None) -> Other | None:
    """Return what several other values are together: a value of the model's code comes first."""
    held = [other for other in found if other is not None]
    for other in held:
        if other.is_value:
            return other
    given = next((other for other in held if other.given), held[0] if held else None)
    return given and replace(given, nothing=any(other.nothing for other in held))


def _either(branches: Iterable[Mapping[str, Other]]) -> dict[str, Other]:
    found: dict[str, Other] = {}
    for others in branches:
        for name, other in others.items():
            found[name] = either(found.get(name), other) or other
    return found
