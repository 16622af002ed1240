"""Rules of a pattern and a scheme: the first that matches wins."""

import pytest
import torch
from torch import nn

import models
from passes import Reinitialize
from rewrite.errors import OptionError
from rewrite.registry import parse, spec
from tests.passes.test_reinit import reinit


def test_first_rule_wins():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2))
    out = reinit(model, scheme="3=zeros;@linear=orthogonal;*=he:fan_out").model
    assert not out[3].weight.any()
    torch.testing.assert_close(out[2].weight @ out[2].weight.T, torch.eye(2))
    assert out[0].weight.any()


def test_rules_from_flags():
    assert Reinitialize.from_flag(["he"]) == Reinitialize(scheme="he")
    built = Reinitialize.from_flag(["head*=zeros", "*=he:fan_out:leaky_relu=0.2"])
    assert [r.pattern for r in built.rules()] == ["head*", "*"]
    assert built.rules()[1].scheme.activation == "leaky_relu=0.2"
    assert Reinitialize.flag_value == "SCHEME"
    for options in (built, Reinitialize(seed=3, residual="zero", lsuv=True)):
        assert parse(spec(options)) == options


def test_what_no_rule_names_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    models.randomize_norms_(model)
    result = reinit(model, scheme="2=zeros")
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert torch.equal(result.model[1].weight, model[1].weight)
    assert torch.equal(result.model[1].running_var, model[1].running_var)
    assert {s.target for s in result.report.skips} == {"0", "1"}


def test_a_pattern_that_matches_nothing_names_close_ones():
    model = nn.Sequential()
    model.add_module("classifier", nn.Linear(3, 3))
    with pytest.raises(OptionError, match=r"clasifier\*=zeros.* no layer.* classifier"):
        reinit(model, scheme="clasifier*=zeros;*=he")
