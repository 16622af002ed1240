"""What was measured of a model's signals: as rows, as JSON, as a table, as a picture."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from rewrite.text.tables import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from rewrite.signals.rows import SignalRow


@dataclass(frozen=True)
class Signal:
    """How activations and gradients propagate through a model."""

    rows: tuple[SignalRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[SignalRow, ...]:
        """The rows of layers with a weight."""
        return tuple(row for row in self.rows if row.is_layer)

    @property
    def activations(self) -> tuple[SignalRow, ...]:
        """The rows of activations."""
        return tuple(row for row in self.rows if not row.is_layer)

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def tables(self, *, verbose: bool = False) -> Iterator[RenderableType]:
        """Yield what to print, as rich renderables."""
        from rich.text import Text

        heads = "layer call mean std saturated dead grad-std weight-grad-std jac-max jac-mean"
        columns = tuple(head.replace("-", " ") for head in heads.split())
        rows = []
        for row in self.rows:
            j = row.jacobian
            rows.append((
                row.name, row.kind, _number(row.mean), _number(row.std),
                _share(row.saturated), _share(row.dead), _number(row.grad_std),
                _number(row.weight_grad_std), _number(j.largest if j else None),
                _number(j.mean if j else None),
            ))  # fmt: skip
        yield Rows(columns, rows, numbers=columns[2:])
        for note in self.notes:
            yield Text(note)

    @overload
    def plot(self, path: str | Path, before: Signal | None = None) -> Path: ...

    @overload
    def plot(self, path: None = None, before: Signal | None = None) -> Figure: ...

    def plot(self, path: str | Path | None = None, before: Signal | None = None) -> Path | Figure:
        """Draw spread by depth into a .png or .svg file, `before` beside it in the same axes.

        Without a path the figure is returned, which a notebook shows.
        """
        from rewrite.signals.plot import draw_signals, plot_signals

        named = {"after": self, "before": before} if before is not None else {"": self}
        return draw_signals(named) if path is None else plot_signals(named, Path(path))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the table."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __repr__(self) -> str:
        return f"<Signal: {len(self.layers)} layers, {len(self.activations)} activations>"

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        console = Console(file=text, width=160)
        for item in self.tables():
            console.print(item)
        return text.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
