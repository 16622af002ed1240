"""Verification of ONNX files: right ones pass, each wrong one is caught at the right node."""

from __future__ import annotations

import pytest

from rewrite.equivalence.verification import Level
from rewrite.errors import OptionError
from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    X,
    add_to,
    graph,
    saved,
    set_attribute,
    skip_relu,
    swap_channels,
    swap_inputs,
)

WRONG = {
    "initializer": (lambda m: add_to(m, "middle_weight", 1e-3), "conv2"),
    "one element": (lambda m: add_to(m, "middle_weight", 1e-3, 100), "conv2"),
    "bias": (lambda m: add_to(m, "head_bias", 1e-3, 1), "head"),
    "epsilon": (lambda m: set_attribute(m, "norm", epsilon=1e-2), "norm"),
    "pads": (lambda m: set_attribute(m, "conv2", pads=[2, 1, 0, 1]), "conv2"),
    "axis": (lambda m: set_attribute(m, "softmax", axis=0), "softmax"),
    "alpha": (lambda m: set_attribute(m, "head", alpha=1.001), "head"),
    "inputs": (lambda m: swap_inputs(m, "sub"), "sub"),
    "channels": (swap_channels, "conv2"),
    "activation": (skip_relu, "conv2"),
}


def test_a_right_graph_is_verified(tmp_path, net):
    path = saved(tmp_path, graph(net))
    for model in (None, net, path):
        found = verify_onnx(path, model, X)
        assert found.ok, str(found)
        assert found.divergence is None
    assert verify_onnx(path, net, X).agreement == 1
    assert verify_onnx(path, net, {"x": X[0]}, level=Level.QUICK).ok
    assert verify_onnx(path, net).ok


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_graph_is_caught_and_located(tmp_path, net, fault):
    model = graph(net)
    spoil, where = WRONG[fault]
    spoil(model)
    path = saved(tmp_path, model)
    for reference in (net, saved(tmp_path, graph(net), "right.onnx")):
        found = verify_onnx(path, reference, X, level=Level.QUICK)
        assert not found.ok
        assert found.divergence is not None
        assert found.divergence.node == where, str(found)


# -- bad input: one clear line each ------------------------------------------------------------


def test_a_level_may_be_a_text_and_an_unknown_one_is_refused(tmp_path, net):
    path = saved(tmp_path, graph(net))
    for level in ("thorough", Level.THOROUGH, "quick", Level.QUICK):
        names = [check.name for check in verify_onnx(path, net, X, level=level).checks]
        assert ("optimization levels" in names) == (level == "thorough")
    with pytest.raises(OptionError, match="level is 'nonsense'; pass quick, thorough"):
        verify_onnx(path, net, X, level="nonsense")
