"""Weight norm, initialization and signal from the command line: bad input in one line, by name."""

import pytest
import torch

from rewrite.checkpoint.load import load
from rewrite.cli.main import main


def test_an_integer_weight_and_a_shape_without_scheme_are_named(linears_here, capsys):
    assert main(["convert", "--weight-norm", "int.pt"]) == 3
    assert "weight is int8" in capsys.readouterr().out
    assert main(["convert", "--reinit", "dirac", "m.pt"]) == 0  # the biases are reset
    assert "dirac needs a convolution's kernel" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["--weight-norm", "--remove-weight-norm"])
def test_a_second_application_has_nothing_to_do(first, linears_here, capsys):
    codes = [main(["convert", "--weight-norm", "m.pt", "-o", "1.pt"])]
    if first == "--remove-weight-norm":
        codes.append(main(["convert", first, "1.pt", "-o", "2.pt"]))
    source = "1.pt" if first == "--weight-norm" else "2.pt"
    capsys.readouterr()
    assert main(["convert", first, source, "-o", "3.pt"]) == 3
    assert "nothing to rewrite" in capsys.readouterr().err
    assert codes == [0] * len(codes)
    assert not (linears_here / "3.pt").exists()


def test_one_sample_warns_by_name_and_leaves_g(linears_here, capsys):
    with pytest.warns(UserWarning, match=r"^[02]: the batch holds one value a unit"):
        code = main(["convert", "--weight-norm", "--data-init", "--calibration", "one.npz", "m.pt"])
    assert code == 0
    before, after = load("m.pt"), load("m.rewritten.pt")
    assert torch.equal(after[0].weight, before[0].weight)
    arguments = ["--weight-norm", "--data-init", "--calibration", "varied.npz", "-o", "v.pt"]
    assert main(["convert", *arguments, "m.pt"]) == 0
    assert not torch.equal(load("v.pt")[0].weight, before[0].weight)
