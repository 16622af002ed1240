"""Save a figure of matplotlib completely, and with the same bytes each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rewrite.files.staging import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write `figure` in the format that the suffix of `path` names; return `path`.

    Raises:
        CheckpointError: the system refuses the file.
    """
    import matplotlib as mpl

    form = path.suffix.lower().lstrip(".")
    # An SVG file would hold the time, and names that are drawn anew.
    metadata = {"Date": None} if form == "svg" else None
    with mpl.rc_context({"svg.hashsalt": "rewrite"}), atomic_path(path) as temporary:
        figure.savefig(temporary, format=form, dpi=120, metadata=metadata)
    return path
