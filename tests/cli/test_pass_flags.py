"""Pass flags and the options that stand behind them."""

from __future__ import annotations

import pytest

from rewrite.cli.main import main
from tests.cli.running import run


@pytest.mark.parametrize(
    ("flag", "after"),
    [
        (["--bn-to-ln"], "GroupNorm(1, 64)"),
        (["--bn-to-ln", "--over", "c"], "ChannelLayerNorm(64)"),
        (["--bn-to-in"], "InstanceNorm2d(64)"),
        (["--bn-to-gn", "--num-groups", "16"], "GroupNorm(16, 64)"),
        (["--num-groups", "16", "--bn-to-gn"], "GroupNorm(16, 64)"),
        (["--pass", "bn-to-gn{channels_per_group=8}"], "GroupNorm(8, 64)"),
    ],
)
def test_pass_flags_and_their_options(checkpoint, capsys, flag, after) -> None:
    code, out, _ = run(capsys, "convert", "--verbose", *flag, checkpoint, "--input", "2x3x12x12")
    assert code == 0 and after in out


def test_a_flag_never_swallows_the_path(checkpoint, capsys) -> None:
    for position in (("--bn-to-gn", checkpoint), (checkpoint, "--bn-to-gn")):
        assert run(capsys, "convert", *position, "--force", "--quiet")[0] == 0


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
def test_bad_options_are_one_line_and_2(said, linears_here, capsys):
    assert main(["convert", *_BAD[said], "m.pt"]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (linears_here / "m.rewritten.pt").exists()
