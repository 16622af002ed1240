"""What makes a branch of a graph vanish: its tail."""

import pytest
import torch

from passes import Reinitialize
from rewrite.pipeline import convert
from tests.init.test_residual import Block, branches


@pytest.mark.parametrize(
    ("form", "tails"),
    [
        ("identity", ["norm.weight"]),
        ("inplace", ["norm.weight"]),
        ("projection", ["norm.weight"]),
        ("no norm", ["two.weight"]),
        ("gated", ["norm.weight"]),
        ("scaled", ["two.weight"]),
        ("summed", ["norm.weight", "two.weight"]),
        ("activated", ["norm.weight"]),
        ("learned scale alone", ["scale"]),
        ("separable", ["norm.weight"]),
        ("difference", ["norm.weight"]),
        ("scaled difference", ["scale"]),
        ("scaled in place", ["scale"]),
        ("computed weight", ["scale"]),
        ("standardized weight", ["one.weight"]),
        ("shifted", ["norm.weight", "shift"]),
        ("attention", ["two.weight"]),
        ("python sum", ["norm.weight"]),
        ("windowed", ["norm.weight"]),
    ],
)
def test_zero_tails_leave_the_shortcut(form, tails):
    model = Block(form).eval()
    (found,) = branches(model)
    assert [tail.weight.name for tail in found.tails] == tails
    assert found.target == ""
    x = torch.randn(2, 4, 6, 6)
    shortcut = shortcut_of(model, x)
    assert not torch.allclose(model(x), shortcut, rtol=1e-3)
    options = Reinitialize(scheme="normal:0.3", residual="zero")
    zeroed = convert(model, [options], verify=False).model
    expected = shortcut_of(zeroed, x)
    assert torch.equal(zeroed(x), expected)
    # Without the option the branch is alive.
    alive = convert(model, [Reinitialize(scheme="normal:0.3")], verify=False).model
    assert not torch.allclose(alive(x), expected, rtol=1e-3)


def shortcut_of(model, x):
    shortcuts = {"projection": model.down, "separable": lambda x: model.down(model.depthwise(x))}
    return shortcuts.get(model.form, lambda x: x)(x)


def test_a_branch_that_nothing_switches_off_says_why():
    (found,) = branches(Block("sigmoid"))
    assert found.tails == ()
    assert "sigmoid" in found.reason
    (found,) = branches(Block("interpolated"))
    assert found.tails == ()
    assert "holds its own input" in found.reason
