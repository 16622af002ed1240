"""Plot a recovery: loss, rate and agreement by step, reliability, penultimate activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rewrite.files.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rewrite.training.recovered import Recovered


def new_panels(columns: int) -> tuple[Figure, list[Any]]:
    """Return a figure with panels side by side.

    Raises:
        OptionError: matplotlib is not installed.
    """
    figure = new_figure(4.5 * columns, 3.6)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def draw_plane(panel: Any, name: str, plane: Mapping[int, Tensor]) -> None:
    """Draw the projected penultimate activations of each class, (n, 2)."""
    for label, points in plane.items():
        panel.scatter(points[:, 0], points[:, 1], s=6, label=f"class {label}")
    panel.set_title(name, fontsize=10)
    panel.set_aspect("equal")
    panel.legend(fontsize=8)


def plot_recovery(recovered: Recovered[Any], path: Path) -> Path:
    """Draw a recovery into a .png or .svg file; return `path`."""
    reliability = recovered.calibration or {}
    figure, panels = new_panels((3 if reliability else 2) + len(recovered.planes))
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
    drawn = panels[len(panels) - len(recovered.planes) :]
    for panel, (name, plane) in zip(drawn, recovered.planes.items(), strict=True):
        draw_plane(panel, name, plane)
    return save_figure(figure, path)
