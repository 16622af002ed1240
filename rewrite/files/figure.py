"""Figures of matplotlib: made without a display, saved completely and with the same bytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rewrite.errors import OptionError
from rewrite.files.staging import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before the work that it would show is done.

    Raises:
        OptionError: matplotlib is not installed, or the suffix is neither .png nor .svg.
    """
    _check_installed()
    if path.suffix.lower() not in _SUFFIXES:
        raise OptionError(f"{path}: a plot is a .png or .svg file")


def _check_installed() -> None:
    if find_spec("matplotlib") is None:
        raise OptionError("plots need matplotlib; pip install matplotlib")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` by `height` inches, which needs no display.

    Raises:
        OptionError: matplotlib is not installed.
    """
    _check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write `figure` in the format that the suffix of `path` names; return `path`.

    Raises:
        OptionError: the suffix is neither .png nor .svg.
        CheckpointError: the system refuses the file.
    """
    check_plot(path)
    import matplotlib as mpl

    form = path.suffix.lower().lstrip(".")
    # An SVG file would hold the time, and names that are drawn anew.
    metadata = {"Date": None} if form == "svg" else None
    with mpl.rc_context({"svg.hashsalt": "rewrite"}), atomic_path(path) as temporary:
        figure.savefig(temporary, format=form, dpi=120, metadata=metadata)
    return path
