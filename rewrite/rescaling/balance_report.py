"""How far a model's layers are from balanced, group by group: `rewrite inspect --balance`.

written_u = Σ w² over weights that write channel u      read_u = Σ w² over weights that read it
factor_u = (read_u / written_u)^(1/4)            the scale that balances u, all others fixed
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rewrite.files.figure import check_plot, new_figure, save_figure
from rewrite.graph.capture import capture
from rewrite.rescaling.balance import Balance
from rewrite.rescaling.plan import edges_of
from rewrite.rescaling.scales import ScaleGroup, Scales
from rewrite.text.some import some
from rewrite.text.tables import Rows

if TYPE_CHECKING:
    from rich.console import RenderableType


_DOMINANT = 3


@dataclass(frozen=True)
class BalanceRow:
    """Channels that share their scales, and the layers on their two sides.

    Attributes:
        channels: the number of channels.
        writers, readers: the names of the layers that write them and that read them.
        typical, worst: the median and the largest factor (or its reciprocal) that would balance a
            channel; 1 is balanced.
        dominant: the channels with the largest sums of squares, and their fractions of the group's.
        log_ratios: log10 of written / read, channel by channel.
    """

    channels: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    typical: float
    worst: float
    dominant: tuple[tuple[int, float], ...]
    log_ratios: tuple[float, ...]


@dataclass(frozen=True)
class BalanceReport:
    """Every group of channels of a model whose scale is free, in data-flow order."""

    rows: tuple[BalanceRow, ...]
    fixed: dict[str, str]

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def tables(self, *, verbose: bool = False) -> Iterator[RenderableType]:
        """Yield what to print, as rich renderables."""
        from rich.text import Text

        title = "Balance: the factor that would balance a channel (1: balanced)"
        heads = ("written by", "read by", "channels", "median", "largest", "dominant channels")
        rows = []
        for row in self.rows:
            shares = ", ".join(f"{channel} ({share:.0%})" for channel, share in row.dominant)
            numbers = (str(row.channels), f"{row.typical:.3g}", f"{row.worst:.3g}", shares)
            rows.append((some(row.writers, 2), some(row.readers, 2), *numbers))
        yield Rows(heads, rows, title, prose=True)
        kept = len(self.fixed)
        if kept and not verbose:
            yield Text(f"Layers that keep the scale of their outputs: {kept} (--report says why)")
        for name, reason in self.fixed.items() if verbose else ():
            yield Text(f"{name} keeps the scale of its outputs: {reason}")

    def plot(self, path: str | Path) -> Path:
        """Draw the ratios by depth into one .png or .svg file.

        Raises:
            OptionError: the suffix is neither .png nor .svg, or matplotlib is not installed.
        """
        path = Path(path)
        check_plot(path)
        figure = new_figure(9, 4)
        axes = figure.subplots()
        for depth, row in enumerate(self.rows):
            places = [depth] * len(row.log_ratios)
            axes.plot(places, row.log_ratios, ".", color="tab:blue", markersize=3, alpha=0.3)
            ordered = sorted(row.log_ratios)
            axes.plot(depth, ordered[len(ordered) // 2], "_", color="black", markersize=10)
        axes.axhline(0, color="tab:gray", linewidth=0.8)
        axes.set_xlabel("group of channels, in data-flow order")
        axes.set_ylabel("log10 of squares written / read")
        axes.grid(alpha=0.3)
        return save_figure(figure, path)


def balance_report(model: nn.Module, example_inputs: Any = None) -> BalanceReport:
    """Return how well the weights of `model` are balanced; it is neither changed nor run.

    Raises:
        OptionError: squares of weights overflow float64.
    """
    captured = capture(model, example_inputs)
    scales = Scales(captured)
    groups = list(scales.groups())
    solver = Balance(edges_of(scales, "l2"), [group.units for group in groups])
    owners = {unit: group for group in groups for unit in group.units.tolist()}
    rows = tuple(_row(owners[int(units[0])], units, p, q) for units, p, q in solver.parts())
    return BalanceReport(rows, {layer.name: reason for layer, reason in scales.refused()})


def _row(group: ScaleGroup, units: Tensor, written: Tensor, read: Tensor) -> BalanceRow:
    place = {unit: number for number, unit in enumerate(group.units.tolist())}
    factors = ((read / written).log().abs() / 4).exp()
    share = (written + read) / (written + read).sum()
    top = share.topk(min(_DOMINANT, len(share)))
    return BalanceRow(
        channels=len(group.units),
        writers=tuple(scaled.layer.name for scaled in group.writers),
        readers=tuple(scaled.layer.name for scaled in group.readers),
        typical=float(factors.median()),
        worst=float(factors.max()),
        dominant=tuple(
            (place[int(units[i])], float(v))
            for v, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ),
        log_ratios=tuple((written / read).log10().tolist()),
    )
