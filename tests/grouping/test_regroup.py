from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import models
import rewrite
from passes import BatchNormToGroupNorm
from rewrite.calibration.batches import Batches
from rewrite.grouping import fit
from rewrite.grouping.fit import NormFit
from rewrite.swap import keep_function as keep

# -- which channels share a group -------------------------------------------------------------


# -- in a model -------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Expansion, depthwise layer and projection; `shows` returns the hidden value as well."""

    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.shows = shows
        self.expand, self.bn1 = nn.Conv2d(6, 32, 1), nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.project, self.act = nn.Conv2d(32, 5, 1), nn.ReLU6()

    def forward(self, x: torch.Tensor) -> object:
        y = self.act(self.bn2(self.depthwise(self.act(self.bn1(self.expand(x))))))
        out = self.project(y).mean((2, 3))
        return (out, y) if self.shows else out


def bottleneck(shows: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return models.randomize_norms_(Bottleneck(shows).eval())


def data(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 6, 1, 1, generator=generator) + torch.randn(
        64, 6, 6, 6, generator=generator
    )


def converted(model: nn.Module) -> rewrite.Result[nn.Module]:
    item = BatchNormToGroupNorm(keep="function", num_groups=4)
    return rewrite.convert(model, [item], calibration=[data(1)], verify=False)


def error(model: nn.Module, changed: nn.Module) -> float:
    with torch.no_grad():
        return float((changed(data(2)) - model(data(2))).norm())


def test_a_model_keeps_more_and_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bottleneck()
    result = converted(model)
    assert all("channels regrouped, in 5 layers alike" in c.note for c in result.report.changes)
    assert all("project" in c.touched for c in result.report.changes)
    monkeypatch.setattr(keep, "shared_orders", lambda *given, **_: [])
    assert error(model, result.model) < 0.8 * error(model, converted(model).model)


def test_a_value_that_is_returned_keeps_its_order() -> None:
    result = converted(bottleneck(shows=True))
    assert not any("regrouped" in change.note for change in result.report.changes)


def test_only_the_groups_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the old function in the place of each new norm it is the model, in another order."""
    model, seen = bottleneck().double(), {}

    def collect(changed: nn.Module, fits: Sequence[NormFit], batches: Batches) -> None:
        fit.collect(changed, fits, batches)
        seen.update({item.probe.target: item.probe for item in fits})

    monkeypatch.setattr(keep, "collect", collect)
    changed = converted(model).model
    for name, probe in seen.items():
        changed.get_submodule(name).register_forward_hook(
            lambda module, args, output, probe=probe: probe.old(args[0])
        )
    with torch.no_grad():
        expected = model(data(2).double())
        assert (changed(data(2).double()) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert len(seen) == 2
    assert not torch.equal(changed.bn2.weight, model.bn2.weight)
