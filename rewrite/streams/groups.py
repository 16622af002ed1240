"""The residual streams that example calls show: per stream, its classes of values in every call.

    stream = a class with a source that is computed from the class itself, and a norm that reads it

A class of one call and a class of another are one stream where a layer writes to both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Node

from rewrite.observe.evidence import Evidence
from rewrite.observe.export import ObservedCall
from rewrite.streams.classes import CallKind, ClassReader, ClassSource
from rewrite.streams.norms import NormCall
from rewrite.streams.values import Values


@dataclass(eq=False)
class Stream:
    """One stream: the classes of values that have to change together, per call.

    Attributes:
        classes: (the values of a call, the value that stands for a class of it).
    """

    classes: list[tuple[Values, Node]] = field(default_factory=list)

    def sources(self) -> Iterator[tuple[Values, ClassSource]]:
        """Yield what writes to it, call by call, in data-flow order."""
        for values, top in self.classes:
            yield from ((values, source) for source in values.sources(top))

    def readers(self) -> Iterator[tuple[Values, ClassReader]]:
        """Yield who reads it, call by call, in data-flow order."""
        for values, top in self.classes:
            yield from ((values, reader) for reader in values.readers(top))

    def holds(self, values: Values, node: Node) -> bool:
        """Return whether a value is of the stream."""
        return node in values.labels and (values, values.top(node)) in self.classes

    def returned(self) -> Iterator[tuple[ObservedCall, str]]:
        """Yield the paths under which calls return values of it."""
        for values, top in self.classes:
            yield from ((values.observed, path) for path in values.returned(top))

    def norms(self) -> Iterator[tuple[Values, NormCall]]:
        """Yield the norms that read it."""
        for values, reader in self.readers():
            if reader.norm is not None:
                yield values, reader.norm


def values_of(evidence: Evidence) -> list[Values]:
    """Return the values of every observed call, in classes."""
    return [Values(observed, evidence.follower(observed)) for observed in evidence.calls]


def streams_of(calls: list[Values]) -> list[Stream]:
    """Return the residual streams of the observed calls, in the order in which they begin."""
    found: list[Stream] = []
    keys: list[set[str]] = []
    for values in calls:
        for top in _tops(values):
            names = _names(values, top)
            residual = _is_residual(values, top)
            met = [place for place, held in enumerate(keys) if held & names]
            if not met and residual:
                found.append(Stream([(values, top)]))
                keys.append(names)
            elif met:
                found[met[0]].classes.append((values, top))
                keys[met[0]] |= names
                for place in reversed(met[1:]):
                    found[met[0]].classes += found.pop(place).classes
                    keys[met[0]] |= keys.pop(place)
    return found


def unsummed(calls: list[Values], streams: list[Stream]) -> Iterator[tuple[Stream, Node]]:
    """Yield what would be a stream if a call joined it, with what is computed of it, by a sum.

    Of values that are joined so again and again, the first; with it, the call.
    """
    for values in calls:
        known = {top for stream in streams for each, top in stream.classes if each is values}
        joins = {top: node for top in _tops(values) if (node := _join(values, top)) is not None}
        made = {values.top(node) for node in joins.values()}
        for top, node in joins.items():
            if top not in known | made:
                yield Stream([(values, top)]), node


def _join(values: Values, top: Node) -> Node | None:
    """Return the call that joins a class with what is computed of it, both before norms."""
    if not _normed(values, top):
        return None
    after = {node for node in values.depends({top}) if not values.of(node, top)}
    for reader in values.readers(top):
        node = reader.node
        if reader.kind is not CallKind.OTHER or node not in values.labels:
            continue
        alike = values.width(node) == values.width(reader.value)
        if alike and after & set(node.all_input_nodes) and _normed(values, values.top(node)):
            return node
    return None


def _normed(values: Values, top: Node) -> bool:
    return any(reader.norm is not None for reader in values.readers(top))


def alike_in(values: Values, stream: Stream) -> list[Node]:
    """Return the classes of one more call that are of a stream."""
    held = [names for each, top in stream.classes if (names := _names(each, top))]
    return [top for top in _tops(values) if any(_names(values, top) & names for names in held)]


def _tops(values: Values) -> list[Node]:
    return list(dict.fromkeys(values.top(node) for node in values.labels))


def _names(values: Values, top: Node) -> set[str]:
    """Return the parameters that write to a class, if anything but parameters does."""
    sources = values.sources(top)
    if all(source.kind in (CallKind.PARAMETER, CallKind.OTHER) for source in sources):
        return set()
    found = {f"{use.tensor}, axis {use.axis}" for source in sources for use in source.uses}
    return found | {
        f"{values.observed.owner(source.node)} (norm)"
        for source in sources
        if source.kind is CallKind.NORM
    }


def _is_residual(values: Values, top: Node) -> bool:
    """Return whether a class is read by a norm, and joined by something computed from itself."""
    if not _normed(values, top):
        return False
    nodes = set(values.depends({top}))
    return any(source.node in nodes for source in values.sources(top))
