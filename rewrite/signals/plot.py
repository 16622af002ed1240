"""Signal propagation as a picture: spread of activations and gradients by depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.files.figure import check_plot, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rewrite.signals.report import Signal
    from rewrite.signals.rows import SignalRow


_STYLES = {"before": ("tab:gray", "--"), "after": ("tab:blue", "-"), "": ("tab:blue", "-")}

_NAMED = 12
"""How many layers have their names below an axis, at most."""


def plot_signals(signals: Mapping[str, Signal], path: Path) -> Path:
    """Draw one or more signals, each under its name, into one .png or .svg file.

    Raises:
        OptionError: another suffix, or matplotlib is not installed.
    """
    check_plot(path)
    figure = draw_signals(signals)
    return save_figure(figure, path)


def draw_signals(signals: Mapping[str, Signal]) -> Figure:
    """Return the figure of one or more signals, each under its name.

    Raises:
        OptionError: matplotlib is not installed.
    """
    figure = new_figure(10, 8)
    axes = figure.subplots(2, 2)
    panels = (
        ("standard deviation of layer outputs", lambda row: row.std, True),
        ("standard deviation of gradients at layer outputs", lambda row: row.grad_std, True),
        ("standard deviation of weight gradients", lambda row: row.weight_grad_std, True),
        ("singular values of the Jacobian (largest, mean)", _spectrum, True),
    )
    for place, (title, value, logarithmic) in zip(axes.flat, panels, strict=True):
        for name, signal in signals.items():
            _draw(place, signal.layers, value, name)
        place.set_title(title, fontsize=10)
        _name_layers(place, max((each.layers for each in signals.values()), key=len))
        if logarithmic and place.lines:
            # Logarithmic from the smallest positive value on, linear below: zeros stay visible.
            drawn = [v for drawn in place.lines for v in drawn.get_ydata() if v > 0]
            least = min(drawn, default=1.0)
            place.set_yscale("symlog", linthresh=least)
            place.set_ylim(bottom=-0.2 * least)
        place.grid(alpha=0.3)
        if len(signals) > 1:
            place.legend()
    return figure


def _name_layers(place: Any, rows: tuple[SignalRow, ...]) -> None:
    """Write the names of some layers below, evenly, the first and the last among them."""
    last = len(rows) - 1
    shown = range(len(rows)) if last < _NAMED else range(0, last + 1, -(-last // (_NAMED - 1)))
    ticks = sorted({*list(shown)[: _NAMED - 1], max(last, 0)}) if rows else []
    names = [rows[tick].name or "(root)" for tick in ticks]
    place.set_xticks(ticks, names, rotation=45, ha="right", fontsize=7)


def _spectrum(row: SignalRow) -> tuple[float, float] | None:
    if row.jacobian is None:
        return None
    return row.jacobian.largest, row.jacobian.mean


def _draw(place: Any, rows: tuple[SignalRow, ...], value: Any, name: str) -> None:
    found = [(depth, value(row)) for depth, row in enumerate(rows)]
    known = [(depth, v) for depth, v in found if v is not None]
    if not known:
        return
    color, line = _STYLES.get(name, ("tab:green", ":"))
    depths = [depth for depth, _ in known]
    series = list(zip(*(v if isinstance(v, tuple) else (v,) for _, v in known), strict=True))
    for index, values in enumerate(series):
        place.plot(
            depths, values, line, color=color, marker=".", markersize=3,
            alpha=1.0 if index == 0 else 0.5, label=name if index == 0 else None,
        )  # fmt: skip
