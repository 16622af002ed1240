"""`rewrite inspect --signal`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import rewrite
from rewrite.cli.main import main
from tests.cli.running import run
from tests.signals.test_measure import chain


def test_signal_makes_up_an_input(capsys, model_here: Path) -> None:
    code, out, _ = run(capsys, "inspect", "--signal", "model.pt")
    assert code == 0 and "grad std" in out


@pytest.mark.parametrize(("recorded", "side"), [(None, 64), ((3, 96, 96), 96)])
def test_a_made_up_image_is_small_unless_the_model_records_a_size(
    capsys, model_here: Path, recorded: tuple[int, int, int] | None, side: int
) -> None:
    model = rewrite.load("model.pt")
    if recorded is not None:
        model.default_cfg = {"input_size": recorded}
        torch.save(model, "model.pt")
    code, out, _ = run(capsys, "inspect", "--signal", "--json", "model.pt")
    assert code == 0 and json.loads(out)["rows"][0]["shape"] == [1, 8, side - 2, side - 2]


@pytest.mark.parametrize("flag", ["--signal", "--balance"])
def test_a_plot_that_cannot_be_drawn_stops_before_the_work(
    capsys, monkeypatch, tmp_path: Path, flag: str
) -> None:
    """The model does not even exist: it was not opened."""
    place = ["inspect", flag, str(tmp_path / "none.pt"), "--plot"]
    code, _, err = run(capsys, *place, str(tmp_path / "a.jpg"))
    assert code == 2 and "a plot is a .png or .svg file" in err
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "rewrite.files.figure.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    code, _, err = run(capsys, *place, str(tmp_path / "a.svg"))
    assert (code, err) == (2, "rewrite: plots need matplotlib; pip install matplotlib\n")


_BAD_SIGNAL = {
    "does not run on the input": ["--input", "2x5"],
    "a plot is a .png or .svg file": ["--input", "2x3", "--plot", "a.gif"],
}


@pytest.mark.parametrize("said", _BAD_SIGNAL)
def test_bad_input_of_signal_is_one_line_and_2(said, linears_here, capsys):
    assert main(["inspect", "--signal", "m.pt", *_BAD_SIGNAL[said]]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_from_the_command_line(tmp_path, capsys):
    from rewrite.checkpoint.load import save
    from rewrite.cli.main import main

    path = str(save(chain(), tmp_path / "model.pt"))
    out, picture = tmp_path / "signal.json", tmp_path / "signal.png"
    arguments = ["--input", "4x40", "--report", str(out), "--plot", str(picture), "--before", path]
    assert main(["inspect", "--signal", path, *arguments]) == 0
    assert "tanh" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["rows"]) == 3
    assert picture.exists()
    assert main(["inspect", "--signal", path, "--input", "4x40", "--plot", "signal.gif"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plot", "a.svg"], "draws what --signal or --balance measures"),
        (["--balance", "--plot", "a.svg", "--before", "b.pt"], "is drawn by --signal with --plot"),
        (["--signal", "--before", "b.pt"], "is drawn by --signal with --plot"),
    ],
)
def test_a_picture_of_nothing_is_refused(
    capsys, model_here: Path, arguments: list[str], said: str
) -> None:
    rewrite.save(chain(), "b.pt")
    code, _, err = run(capsys, "inspect", "model.pt", *arguments)
    assert code == 2 and said in err and not Path("a.svg").exists()
