"""A picture has the same bytes each time."""

from __future__ import annotations

import time

import pytest

from rewrite.files.figure import save_figure

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, name) -> None:
    from matplotlib.figure import Figure

    written = []
    for _ in range(2):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([1, 2, 3], label="line")
        axes.legend()
        written.append(save_figure(figure, tmp_path / name).read_bytes())
        time.sleep(1.01)  # the format would keep seconds
    assert written[0] == written[1]
