"""Weight norm, initialization and signal from the command line: bad input in one line, by name."""

import numpy as np
import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), tmp_path / "m.pt")
    whole = nn.Sequential(nn.Linear(3, 3))
    whole[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    save(whole, tmp_path / "int.pt")
    np.savez(tmp_path / "one.npz", x=np.ones((1, 3), "f4"))
    varied = np.random.default_rng(0).normal(size=(16, 3)).astype("f4")
    np.savez(tmp_path / "varied.npz", x=varied)
    monkeypatch.chdir(tmp_path)
    return tmp_path


_BAD = {
    "unknown scheme 'hee'; did you mean he?": ["--reinit", "hee"],
    "unknown activation 'rellu'; known are celu": ["--reinit", "he", "--activation", "rellu"],
    "unknown layer kind 'convv'; known are linear": ["--reinit", "@convv=he"],
    "unknown layer kind 'kind'; known are linear": ["--weight-norm", "--kinds", "kind"],
    "headd*=zeros: the pattern matches no layer; there are": ["--reinit", "headd*=zeros"],
    "data_init needs a batch; pass calibration data": ["--weight-norm", "--data-init"],
    "lsuv needs a batch; pass calibration data": ["--reinit", "he", "--lsuv"],
    "known are none, zero, depth, fixup": ["--reinit", "he", "--residual", "one"],
}


@pytest.mark.parametrize("said", _BAD)
def test_bad_options_are_one_line_and_2(said, folder, capsys):
    assert main(["convert", *_BAD[said], "m.pt"]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (folder / "m.rewritten.pt").exists()


_BAD_SIGNAL = {
    "does not run on the input": ["--input", "2x5"],
    "a plot is a .png or .svg file": ["--input", "2x3", "--plot", "a.gif"],
}


@pytest.mark.parametrize("said", _BAD_SIGNAL)
def test_bad_input_of_signal_is_one_line_and_2(said, folder, capsys):
    assert main(["inspect", "--signal", "m.pt", *_BAD_SIGNAL[said]]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_an_integer_weight_and_a_shape_without_scheme_are_named(folder, capsys):
    assert main(["convert", "--weight-norm", "int.pt"]) == 3
    assert "weight is int8" in capsys.readouterr().out
    assert main(["convert", "--reinit", "dirac", "m.pt"]) == 0  # the biases are reset
    assert "dirac needs a convolution's kernel" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["--weight-norm", "--remove-weight-norm"])
def test_a_second_application_has_nothing_to_do(first, folder, capsys):
    codes = [main(["convert", "--weight-norm", "m.pt", "-o", "1.pt"])]
    if first == "--remove-weight-norm":
        codes.append(main(["convert", first, "1.pt", "-o", "2.pt"]))
    source = "1.pt" if first == "--weight-norm" else "2.pt"
    capsys.readouterr()
    assert main(["convert", first, source, "-o", "3.pt"]) == 3
    assert "nothing to rewrite" in capsys.readouterr().err
    assert codes == [0] * len(codes)
    assert not (folder / "3.pt").exists()


def test_one_sample_warns_by_name_and_leaves_g(folder, capsys):
    with pytest.warns(UserWarning, match=r"^[02]: the batch holds one value a unit"):
        code = main(["convert", "--weight-norm", "--data-init", "--calibration", "one.npz", "m.pt"])
    assert code == 0
    before, after = load("m.pt"), load("m.rewritten.pt")
    assert torch.equal(after[0].weight, before[0].weight)
    arguments = ["--weight-norm", "--data-init", "--calibration", "varied.npz", "-o", "v.pt"]
    assert main(["convert", *arguments, "m.pt"]) == 0
    assert not torch.equal(load("v.pt")[0].weight, before[0].weight)
