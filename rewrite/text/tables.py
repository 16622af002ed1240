"""Rows under heads: a table where it fits the screen, else each row below its name.

A table that is wider than the screen breaks names within a word. Here a row whose cells do not fit
beside each other is its first cell on a line, and the others below it, each after its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from rewrite.text.alike import group_alike

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_GAP = 2


@dataclass(frozen=True)
class Rows:
    """Rows of text, for rich to print.

    Attributes:
        heads: the name of each column; the first names a row, and stands alone where it has to.
        rows: one text a column.
        title: stands above.
        numbers: the heads whose column is flushed right.
        prose: whether the last column holds sentences, which may go over several lines.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: Sequence[str] = ()
    prose: bool = False

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.text import Text

        if self.title:
            yield Text(self.title, "italic")
        if self._width() <= options.max_width:
            yield self._table()
        else:
            yield from self._entries()

    def _width(self) -> int:
        """Return how wide the columns have to be for no word to be broken."""
        from rich.cells import cell_len

        widths = [max(map(cell_len, cells)) for cells in zip(self.heads, *self.rows, strict=True)]
        if self.prose:
            words = chain.from_iterable(row[-1].split() for row in self.rows)
            widths[-1] = max(map(cell_len, (self.heads[-1], *words)))
        return sum(widths) + _GAP * (len(widths) - 1)

    def _table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for head in self.heads:
            table.add_column(head, justify="right" if head in self.numbers else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _entries(self) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        for name, *cells in self.rows:
            said = [
                f"{head} {cell}" for head, cell in zip(self.heads[1:], cells, strict=True) if cell
            ]
            yield Padding(Text(name), (0, 0, 0, 2), expand=False)
            yield Padding(Text(", ".join(said)), (0, 0, 0, 6), expand=False)


def merged(rows: Sequence[tuple[str, ...]], *, verbose: bool) -> list[tuple[str, ...]]:
    """Return the rows, unless `verbose` those that are alike as one with their number."""
    if verbose:
        return list(rows)
    return [
        (f"{name}  {group.count} alike" if group.count > 1 else name, *rest)
        for group in group_alike(rows)
        for name, *rest in (group.texts,)
    ]
