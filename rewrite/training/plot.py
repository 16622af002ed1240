"""A recovery as a picture: loss and rate by step, agreement by step, reliability by confidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import OptionError
from rewrite.files.figure import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rewrite.training.recovered import Recovered

SUFFIXES = (".png", ".svg")


def new_figure(columns: int) -> tuple[Figure, list[Any]]:
    """Return a figure with panels side by side.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plots need matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(4.5 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as .png or .svg.

    Raises:
        OptionError: another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path}: a plot is written as {' or '.join(SUFFIXES)}")
    return save_figure(figure, path)


def plot_recovery(recovered: Recovered[Any], path: Path) -> Path:
    """Draw a recovery; return `path`."""
    reliability = recovered.calibration or {}
    figure, panels = new_figure(3 if reliability else 2)
    steps = [step for step, _, _ in recovered.steps]
    panels[0].plot(steps, [loss for _, loss, _ in recovered.steps], color="tab:blue")
    panels[0].set(xlabel="step", ylabel="loss", yscale="log")
    rate = panels[0].twinx()
    rate.plot(steps, [value for _, _, value in recovered.steps], color="tab:gray", linestyle="--")
    rate.set_ylabel("learning rate")
    places = [step for step, _ in recovered.agreements]
    if recovered.before.top1 is not None:
        panels[1].plot(places, [held.top1 for _, held in recovered.agreements], marker="o")
        panels[1].set_ylabel("same top-1 on what was held out")
    else:
        panels[1].plot(places, [held.error for _, held in recovered.agreements], marker="o")
        panels[1].set_ylabel("relative error on what was held out")
    panels[1].set_xlabel("step")
    for name, one in reliability.items():
        bins = one.reliability.bins
        label = f"{name}: {one.reliability.error:.3f}"
        panels[2].plot([b[1] for b in bins], [b[2] for b in bins], marker="o", label=label)
    if reliability:
        panels[2].plot([0, 1], [0, 1], color="tab:gray", linestyle=":")
        panels[2].set(xlabel="confidence", ylabel="accuracy")
        panels[2].legend(fontsize=8)
    return write_figure(figure, path)
