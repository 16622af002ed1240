"""Compare two models module by module: calls, readers, and the error of each value.

    error(v) = min over values u of the other model of |v - u| / |v|         in float64
    error(m) = max of error(v) over the values v that module m makes

A rewrite moves values on purpose (after a fold the convolution's output is the old norm's), so a
value is compared with the nearest value of the other model, wherever that is computed. If no value
is near, it is compared with the output of the call of the same name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from rewrite.equivalence.divergence import recorded
from rewrite.equivalence.record import Event, Known, Record, Sketcher
from rewrite.errors import RewriteError, VerificationError, one_line
from rewrite.runtime.float64 import in_float64, short_of_memory
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.modes import evaluating, widen
from rewrite.runtime.tree import Tree
from rewrite.text.alike import Alike, group_alike
from rewrite.text.tables import Rows

ROUNDING = 1e-6
"""Relative error that storing float32 parameters explains, where it was not measured."""


@dataclass(frozen=True)
class ModuleRow:
    """One module of a model.

    Attributes:
        name: its qualified name; "" for the model itself.
        kind: the name of its class.
        parameters: the number of its own parameters' elements, without its children's.
        calls: the functions that its own forward calls, in order, each with its count.
        readers: the modules whose forward reads a value that it computes.
        order: the number of its first call among all calls, None if it was not run.
        error: the largest relative error of its values, None if it computes none.
    """

    name: str
    kind: str
    parameters: int
    calls: Mapping[str, int] = field(default_factory=dict)
    readers: tuple[str, ...] = ()
    order: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class SideBySide:
    """The modules of two models, in the order of `named_modules`."""

    before: tuple[ModuleRow, ...]
    after: tuple[ModuleRow, ...]

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of parameters of each model."""
        before, after = (sum(row.parameters for row in rows) for rows in (self.before, self.after))
        return before, after

    def different(self) -> Iterator[tuple[str, str, str, float | None]]:
        """Yield name, class before, class after and error of each module that differs.

        A class is "" where the module is missing. A module of both models differs if its class, its
        number of parameters or its values do.
        """
        before = {row.name: row for row in self.before}
        after = {row.name: row for row in self.after}
        for name in dict.fromkeys((*before, *after)):
            a, b = before.get(name), after.get(name)
            error = None if b is None else b.error
            same = (
                a is not None and b is not None and (a.kind, a.parameters) == (b.kind, b.parameters)
            )
            if not same or (error or 0.0) > ROUNDING:
                yield name, a.kind if a else "", b.kind if b else "", error

    def summary(self) -> str:
        """Return in one sentence how many modules differ, and the largest error."""
        rows = list(self.different())
        errors = [row.error for row in self.after if row.error is not None]
        ran = f"largest relative error {max(errors):.1e}" if errors else "nothing was run"
        return f"{len(rows)} of {len(self.after)} modules differ; {ran}"

    def to_json(self) -> str:
        """Return both models' modules as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def tables(self, *, verbose: bool = False) -> Iterator[Any]:
        """Yield rich renderables: a table of the modules that differ, then the summary.

        Modules that differ in the same way share a row, with the largest error, unless `verbose`.
        """
        from rich.text import Text

        rows = list(self.different())
        texts = [(name or "(root)", before, after) for name, before, after, _ in rows]
        groups = [Alike(text, 1, (at,)) for at, text in enumerate(texts)]
        shown = []
        for group in groups if verbose else group_alike(texts):
            known = [rows[at][3] for at in group.places]
            errors = [error for error in known if error is not None]
            name, *kinds = group.texts
            alike = f"  {group.count} alike" if group.count > 1 else ""
            shown.append((f"{name}{alike}", *kinds, f"{max(errors):.1e}" if errors else ""))
        if shown:
            yield Rows(("module", "A", "B", "error"), shown)
        yield Text(self.summary())


def side_by_side(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs | None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> SideBySide:
    """Compare two models module by module.

    Args:
        before: the original.
        after: the rewritten model.
        inputs: what both are run on; without them neither is run, and no error is known.
        seed: of the random numbers that a forward draws.
        progress: called with a line as each step begins.

    Raises:
        VerificationError: a model raises on the inputs.
    """
    if inputs is None:
        return SideBySide(_rows(before, None, ()), _rows(after, None, ()))
    sketch = Sketcher(seed)
    wide = inputs.map(widen)
    with (
        evaluating(before, after),
        in_float64(before, after, streamed=short_of_memory(before, after)),
    ):
        try:
            progress("running the first model in float64")
            record_a, _ = recorded(before, wide, sketch, seed)
            progress("running the second model in float64")
            record_b, _ = recorded(after, wide, sketch, seed)
        except RewriteError:
            raise
        except Exception as error:  # whatever the forward of a model raises
            raise VerificationError(
                f"the models do not run beside each other on this input: {one_line(error)}; "
                "pass another --input"
            ) from error
    progress("looking for the nearest value of each")
    return of_runs(before, after, (record_a, record_b))


def of_runs(before: nn.Module, after: nn.Module, runs: tuple[Record, Record]) -> SideBySide:
    """Compare two models module by module from the records of a run on one input."""
    record_a, record_b = runs
    return SideBySide(
        _rows(before, record_a, _distances(record_a, record_b)),
        _rows(after, record_b, _distances(record_b, record_a)),
    )


def _distances(own: Record, other: Record) -> list[float]:
    """Return each value's distance to the other's nearest value, or that of the same call."""
    known = Known(other.values)
    found = [known.nearest(value).distance for value in own.values]
    theirs = other.by_key()
    for event in own.events:
        twin = theirs.get(event.key)
        if twin is None:
            continue
        for number, there in zip(event.outputs, twin.outputs, strict=False):
            apart = own.values[number].distance(other.values[there])
            found[number] = min(found[number], apart)
    return found


def _rows(
    model: nn.Module, record: Record | None, distances: Sequence[float]
) -> tuple[ModuleRow, ...]:
    events: dict[str, list[tuple[int, Event]]] = {}
    readers: dict[str, dict[str, None]] = {}
    if record is not None:
        for place, event in enumerate(record.events):
            events.setdefault(event.owner, []).append((place, event))
            for number in event.inputs:
                made = record.producer[number]
                owner = "" if made is None else record.events[made].owner
                if made is not None and owner != event.owner:
                    readers.setdefault(owner, {})[event.owner] = None
    rows = []
    for name, module in Tree(model).modules():
        own = events.get(name, [])
        errors = [distances[number] for _, event in own for number in event.outputs]
        held: dict[int, Any] = {id(p): p for p in module._parameters.values() if p is not None}
        rows.append(
            ModuleRow(
                name,
                type(module).__name__,
                sum(_size(p) for p in held.values()),
                dict(Counter(event.function for _, event in own)),
                tuple(readers.get(name, ())),
                own[0][0] if own else None,
                max(errors) if errors else None,
            )
        )
    return tuple(rows)


def _size(parameter: Any) -> int:
    return 0 if nn.parameter.is_lazy(parameter) else int(parameter.numel())
