from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import models
import rewrite
from passes import BatchNormToGroupNorm
from rewrite.affine.planner import Planner
from rewrite.calibration.batches import Batches
from rewrite.graph.capture import capture
from rewrite.grouping import fit
from rewrite.grouping.assignment import Means, Sums, regrouped
from rewrite.grouping.fit import NormFit
from rewrite.grouping.mean_removal import factors, removal_error
from rewrite.grouping.statistics import MeanStatistics
from rewrite.swap import keep_function as keep


def means(channels: int, seed: int = 0, **options: bool) -> Means:
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((channels, channels // 3 + 1))
    covariance = mixing @ mixing.T / channels + 0.01 * np.eye(channels)
    return Means(covariance, random.uniform(0.5, 2.0, channels), **options)


def lost(item: Means, order: np.ndarray, groups: int) -> float:
    rows = order.reshape(groups, -1)
    second = item.covariance[rows[:, :, None], rows[:, None, :]]
    weight = item.weight[rows]
    return float(removal_error(second, weight, factors(second, weight, shrinkage=0.0)).sum())


# -- which channels share a group -------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups"), [(24, 3), (32, 16), (60, 10)])
def test_other_groups_lose_less(channels: int, groups: int) -> None:
    item = means(channels)
    order = regrouped([item], groups)
    assert sorted(order) == list(range(channels))
    assert lost(item, order, groups) < 0.8 * lost(item, np.arange(channels), groups)


def test_channels_that_cancel_come_together() -> None:
    covariance = np.eye(8) + 0.999 * np.eye(8)[::-1]
    order = regrouped([Means(covariance, np.ones(8))], 4)
    assert {frozenset(pair) for pair in order.reshape(4, 2).tolist()} == {
        frozenset((c, 7 - c)) for c in range(4)
    }


def test_norms_that_share_an_order_each_count() -> None:
    items = [means(48, seed) for seed in (1, 2)]
    order, own = regrouped(items, 6), regrouped(items[:1], 6)
    identity = np.arange(48)
    assert all(lost(item, order, 6) < lost(item, identity, 6) for item in items)
    assert lost(items[1], order, 6) < lost(items[1], own, 6)


def test_without_signs_or_factors_the_search_still_ends() -> None:
    for options in ({"signed": False}, {"sized": False, "signed": False}):
        order = regrouped([means(24, **options)], 4)
        assert sorted(order) == list(range(24))


def test_rounding_decides_nothing() -> None:
    item = means(48)
    alive = np.repeat([1.0, 0.0], [40, 8])
    covariance, weight = item.covariance * alive * alive[:, None], item.weight * alive
    noise = 1 + 1e-14 * np.random.default_rng(0).standard_normal((48, 48))
    expected = regrouped([Means(covariance, weight)], 6)
    for other in (noise, noise**2, noise**3):
        assert np.array_equal(regrouped([Means(covariance * other, weight)], 6), expected)


@pytest.mark.parametrize("covariance", [np.zeros((8, 8)), np.diag([0.0] * 7 + [1e30])])
def test_degenerate_means_give_an_order(covariance: np.ndarray) -> None:
    assert sorted(regrouped([Means(covariance, np.zeros(8))], 2)) == list(range(8))


@pytest.mark.parametrize("signed", [True, False])
def test_the_sums_that_are_kept_are_those_summed_anew(signed: bool) -> None:
    random = np.random.default_rng(0)
    part = Sums.of(means(20, signed=signed), random)
    label = np.arange(20) // 5
    part.fresh(label, 4)
    for c in (0, 7, 19, 3):
        exchange = part.exchange(c, label)
        d = int(np.where(label == label[c], 0, exchange.change).argmin())
        if label[d] == label[c]:
            continue
        before = part.loss
        part.apply(c, d, label, exchange)
        label[c], label[d] = label[d], label[c]
        assert part.loss == pytest.approx(before + exchange.change[d])
        member = np.zeros((20, 4))
        member[np.arange(20), label] = part.sign
        np.testing.assert_allclose(part.product, part.kernel @ member, atol=1e-12)
        np.testing.assert_allclose(part.square, (member * part.product).sum(0), atol=1e-12)


def test_sums_over_all_channels_hold_those_of_any_groups() -> None:
    samples = torch.randn(7, 12, dtype=torch.float64)
    order = torch.randperm(12)
    wide, narrow = MeanStatistics.zeros(12, 1), MeanStatistics.zeros(12, 3)
    wide.add(samples)
    narrow.add(samples[:, order])
    grouped = wide.grouped(order, 3)
    assert torch.equal(grouped.total, narrow.total)
    torch.testing.assert_close(grouped.second, narrow.second, rtol=1e-14, atol=1e-14)


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


def test_a_depthwise_layer_hands_on_what_the_weights_say() -> None:
    """With nothing in between and one tap, the covariance behind it is that in front, scaled."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1, groups=8), nn.GroupNorm(2, 8)
    ).double()
    ones, zeros = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    probes = [keep.SwappedNorm(str(i), model[i], ones, zeros) for i in (1, 3)]
    captured = capture(model)
    fits = fit.fits_of(captured, Planner(captured), probes)
    with torch.no_grad():
        fit.collect(model, fits, Batches(model, [data(1).double()], hold_out=0))
    first, second = (item.prior() for item in fits)
    slope = model[2].weight.detach().flatten().reshape(2, 4)
    assert fits[1].source is fits[0]
    torch.testing.assert_close(second, slope[:, :, None] * first * slope[:, None, :])
