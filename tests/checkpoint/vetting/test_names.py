"""Names are judged as text: the lists say what has a meaning, trust what may be named beside."""

from __future__ import annotations

import pytest

from rewrite.checkpoint.vetting.names import may_have_meaning, public_name, refuse_unless_allowed
from rewrite.errors import CheckpointError


@pytest.mark.parametrize(
    "name", ["torch.relu", "math.sqrt", "builtins.int", "torch._C._nn.gelu", "numpy.float32"]
)
def test_what_has_a_meaning(name):
    assert may_have_meaning(name)
    refuse_unless_allowed(name, ())


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("os.system", "no --trust allows"),
        ("torch.load", "--trust torch.load"),
        ("torch.fx.graph_module.GraphModule", "rewrite.save"),
        ("mine.Layer", "--trust mine"),
    ],
)
def test_what_nobody_allowed_is_refused_with_the_fix(name, fix):
    with pytest.raises(CheckpointError, match=fix):
        refuse_unless_allowed(name, ())


def test_trust_does_not_reach_into_python():
    refuse_unless_allowed("mine.Layer", ("mine",))
    with pytest.raises(CheckpointError, match="no --trust"):
        refuse_unless_allowed("subprocess.Popen", ("subprocess",))


def test_public_names():
    assert public_name("torch._C._fft.fft_rfft2") == "torch.fft.rfft2"
    assert public_name("mine.relu") == "mine.relu"
