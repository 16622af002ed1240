from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import rewrite
from passes import RemoveStandardize, WeightStandardize
from rewrite.errors import OptionError
from rewrite.protocol import apply_pass

_LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3), (2, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "depthwise": (nn.Conv1d(6, 12, 3, groups=6), (2, 6, 9)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), (2, 6, 4, 4)),
    "grouped transposed": (nn.ConvTranspose1d(6, 8, 3, groups=2), (2, 6, 5)),
    "linear": (nn.Linear(6, 8), (2, 6)),
}


def _standardized(model: nn.Module) -> nn.Module:
    return apply_pass(
        WeightStandardize(kinds="conv,conv_transpose,linear", eps=1e-12), copy.deepcopy(model)
    ).model


@pytest.mark.parametrize("name", _LAYERS)
def test_the_function_stays_and_the_weight_is_standardized(name: str) -> None:
    layer, shape = _LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer)).double()
    with torch.no_grad():
        model[0].weight.mul_(3).add_(0.7)
    made = _standardized(model)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-12)
    gain, offset, v = made[0].parametrizations.weight.parameters()
    # Scale and shift of a unit's v change nothing; its gain scales, its offset shifts it.
    with torch.no_grad():
        v.mul_(2.0).add_(1.0)
        scaled = made(x)
    assert (scaled - model(x)).abs().max() < 1e-9
    with torch.no_grad():
        gain.mul_(1.5)
        offset.add_(0.1)
    assert (made(x) - model(x)).abs().max() > 1e-2


def test_the_whole_way(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    result = rewrite.convert(model, ["bn-to-gn", "weight-standardize"], example_inputs=(x,))
    assert result.report.ok and len(result.report.passes[1].changes) == 2
    rewrite.save(result.model, tmp_path / "m.pt")
    opened = rewrite.load(str(tmp_path / "m.pt"))
    assert torch.equal(opened(x), result.model(x))
    back = rewrite.convert(opened, ["remove-standardize"], example_inputs=(x,))
    assert back.report.ok and type(back.model[0]) is nn.Conv2d
    assert torch.equal(back.model(x), opened(x))
    assert set(back.model.state_dict()) == set(rewrite.convert(
        model, ["bn-to-gn"], example_inputs=(x,)).model.state_dict())  # fmt: skip
    changes = {k: v for c in back.report.passes[0].changes for k, v in c.keys.items()}
    assert changes["0.parametrizations.weight.original2"] == "0.weight"


@pytest.mark.parametrize("computed", ["weight-standardize", "weight-norm"])
def test_folding_bakes_it(computed: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 8, 8)
    result = rewrite.convert(model, [computed, "fold"], example_inputs=(x,))
    assert result.report.ok and not parametrize.is_parametrized(result.model[0])


def test_declines() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[1].weight
    applied = apply_pass(WeightStandardize(), model)
    assert not applied.changes
    reasons = [skip.reason for skip in applied.skips]
    assert "one input a unit" in reasons[0] and all("is tied to" in r for r in reasons[1:])


def test_leaves_the_rest_alone_and_frozen_weights_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    applied = apply_pass(WeightStandardize(), model)
    assert [change.target for change in applied.changes] == ["0"]
    assert not any(p.requires_grad for p in model[0].parametrizations.parameters())
    assert not apply_pass(WeightStandardize(), model).changes
    assert not apply_pass(RemoveStandardize(), nn.Sequential(nn.Linear(2, 2))).changes


def test_options() -> None:
    for bad, reason in (({"kinds": "embedding"}, "layer kind 'embedding'"), ({"eps": 0.0}, "eps")):
        with pytest.raises(OptionError, match=reason):
            WeightStandardize(**bad)
