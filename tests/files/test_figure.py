"""A picture has the same bytes each time, and one that cannot be drawn is refused in one line."""

from __future__ import annotations

import pytest

from rewrite.errors import OptionError
from rewrite.files.figure import check_plot, new_figure, save_figure

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_figure_gives_the_same_bytes_at_any_time(tmp_path, name, monkeypatch) -> None:
    written = []
    for now in ("1000000", "2000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", now)  # what matplotlib takes for the time
        figure = new_figure(4, 3)
        axes = figure.subplots()
        axes.plot([1, 2, 3], label="line")
        axes.legend()
        written.append(save_figure(figure, tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_another_suffix_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(OptionError, match=r"a\.gif: a plot is a \.png or \.svg file"):
        save_figure(new_figure(4, 3), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_every_way_to_a_plot_says_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("rewrite.files.figure.find_spec", lambda name: None)
    for draw in (lambda: new_figure(4, 3), lambda: check_plot(tmp_path / "a.svg")):
        with pytest.raises(OptionError, match=r"^plots need matplotlib; pip install matplotlib$"):
            draw()
