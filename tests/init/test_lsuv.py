"""LSUV: the output of each layer has unit variance."""

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from tests.passes.test_reinit import reinit


def test_lsuv_gives_unit_variance_to_every_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )  # fmt: skip
    x = 2 + 5 * torch.randn(16, 3, 8, 8)
    result = reinit(model, scheme="orthogonal", lsuv=True, tolerance=1e-3, calibration=[x])
    seen = []
    for layer in (result.model[0], result.model[2], result.model[5]):
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out.var(correction=0).item()))
    result.model(x)
    assert seen == pytest.approx([1, 1, 1], abs=1e-3)
    assert "variance" in result.report.changes[0].note
    plain = reinit(model, scheme="orthogonal").model
    assert plain[0](x).var().item() > 5


def test_lsuv_without_data():
    with pytest.raises(OptionError, match="calibration"):
        reinit(nn.Linear(3, 3), lsuv=True)


def test_lsuv_with_a_constant_output_names_the_layer():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"^0: the output has variance 0"):
        out = reinit(model, lsuv=True, calibration=[torch.zeros(4, 3)]).model
    assert torch.isfinite(out[0].weight).all()
