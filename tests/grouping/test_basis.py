from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from passes import BatchNormToGroupNorm
from rewrite.affine.context import AnalysisContext
from rewrite.calibration.batches import Batches
from rewrite.graph.capture import capture
from rewrite.graph.operators import norm_of
from rewrite.grouping import basis as mixing
from rewrite.grouping import fit, regroup
from rewrite.grouping.fit import NormFit
from rewrite.grouping.permutation import Order, order_of
from rewrite.swap import keep_function as keep


class Stream(nn.Module):
    """A stream that three norms write, in one of several ways to read it on the way."""

    def __init__(self, way: str = "plain", bias: bool = False) -> None:
        super().__init__()
        self.way = way
        self.stem, self.bn0 = nn.Conv2d(5, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12)
        self.expand = nn.ModuleList([nn.Conv2d(12, 20, 1), nn.Conv2d(12, 20, 3, padding=1)])
        self.project = nn.ModuleList([nn.Conv2d(20, 12, 1, bias=bias) for _ in range(2)])
        self.bn = nn.ModuleList([nn.BatchNorm2d(12) for _ in range(2)])
        self.head = nn.ConvTranspose2d(12, 6, 2, stride=2)
        if way == "depthwise":  # a layer that only another way would call could be chosen later
            self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        elif way in ("norm input read", "written without a norm"):
            self.other = nn.Conv2d(12, 12, 1)
        self.free = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        y = self.free(self.bn0(stem))
        for i in range(2):
            inner = self.project[i](self.expand[i](y).relu())
            y = y - self.bn[i](inner) if i else y + self.bn[i](inner)
        if self.way == "activation":
            y = y.relu()
        elif self.way == "depthwise":
            y = self.depthwise(y)
        elif self.way == "product":
            y = y * y
        elif self.way == "unswapped norm":
            y = y + nn.functional.layer_norm(y.movedim(1, -1), (12,)).movedim(-1, 1)
        elif self.way == "norm input read":
            y = y + self.other(stem)
        elif self.way == "written without a norm":
            y = y + self.other(y)
        elif self.way == "pooled":
            y = nn.functional.max_pool2d(y, 2)
        return self.head(y).mean((2, 3))


def stream(way: str = "plain", bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return models.randomize_norms_(Stream(way, bias).double().eval())


def data(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(80, 5, 1, 1, generator=generator)
    return (means + torch.randn(80, 5, 6, 6, generator=generator)).double()


def converted(model: nn.Module, **options: Any) -> rewrite.Result[nn.Module]:
    options = {"num_groups": 4} | options
    item = BatchNormToGroupNorm(keep="function", **options)
    return rewrite.convert(model, [item], calibration=[data(1)], verify=False)


def error(model: nn.Module, changed: nn.Module) -> float:
    with torch.no_grad():
        old = model(data(2))
        return float((changed(data(2)) - old).norm() / (old - old.mean(0)).norm())


def in_the_old_place(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[nn.Module, int]:
    """Return the converted model with the old function in the place of each new norm."""
    seen: list[NormFit] = []

    def collect(changed: nn.Module, fits: Sequence[NormFit], batches: Batches) -> None:
        fit.collect(changed, fits, batches)
        seen.extend(fits)

    monkeypatch.setattr(keep, "collect", collect)
    changed = converted(model, **options).model
    for item in seen:
        changed.get_submodule(item.probe.target).register_forward_hook(
            lambda module, args, output, probe=item.probe: probe.old(args[0])
        )
    return changed, sum(item.mixed for item in seen)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4, 6])
def test_another_basis_is_the_same_function(
    bias: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stream(bias=bias)
    changed, mixed = in_the_old_place(model, monkeypatch, num_groups=groups)
    assert mixed == 3
    assert error(model, changed) <= 1e-12
    # The negative twin: one reader that is left in the old basis is another function.
    changed.expand[1].weight.data.copy_(model.expand[1].weight.data)
    assert error(model, changed) > 1e-2


def test_dead_and_negative_scales_are_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stream()
    with torch.no_grad():
        model.bn0.weight[:5] = 0
        model.bn[0].weight.zero_()
        model.bn[1].weight.neg_()
    changed, mixed = in_the_old_place(model, monkeypatch)
    assert mixed == 3
    assert error(model, changed) <= 1e-12
    assert all(bool(torch.isfinite(p).all()) for p in changed.parameters())


def test_the_model_keeps_more_than_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stream()
    result = converted(model)
    assert all("in another basis, in 9 layers alike" in c.note for c in result.report.changes)
    assert {"stem", "expand.0", "project.1", "head"} <= set(result.report.changes[0].touched)
    shapes = {key: value.shape for key, value in model.state_dict().items() if "running" not in key}
    kept = result.model.state_dict()
    assert all(kept[key].shape == shape for key, shape in shapes.items() if key in kept)
    monkeypatch.setattr(regroup, "can_mix", lambda *given: False)
    assert error(model, result.model) < 0.7 * error(model, converted(model).model)


@pytest.mark.parametrize(
    "way",
    ["activation", "depthwise", "product", "unswapped norm", "norm input read",
     "written without a norm", "pooled"],
)  # fmt: skip
def test_what_is_not_linear_keeps_its_basis(way: str) -> None:
    result = converted(stream(way))
    assert len(result.report.changes) == 3
    assert not any("basis" in change.note for change in result.report.changes)


def test_one_norm_left_alone_keeps_the_basis() -> None:
    item = BatchNormToGroupNorm(keep="function", num_groups=4)
    result = rewrite.convert(stream(), [item], calibration=[data(1)], verify=False, skip=["bn.1"])
    assert len(result.report.changes) == 2
    assert not any("basis" in change.note for change in result.report.changes)


@pytest.mark.parametrize("options", [{"anchor": 1.0}])
def test_without_anything_to_gain_the_basis_stays(options: dict[str, object]) -> None:
    result = converted(stream(), **options)
    assert not any("basis" in change.note for change in result.report.changes)


@pytest.mark.parametrize(
    ("way", "linear"), [("plain", True), ("activation", False), ("depthwise", False)]
)
def test_an_order_says_whether_its_values_are_only_summed(way: str, linear: bool) -> None:
    model = stream(way)
    captured = capture(model)
    norm = next(node for node in captured.nodes() if norm_of(captured, node) is not None)
    order = order_of(AnalysisContext(captured, {}), norm, ())
    assert isinstance(order, Order)
    assert order.linear == linear
    writes = {row.ref.name for row in order.rows if row.side == "writes"}
    assert {"stem.weight", "project.0.weight", "project.1.weight"} <= writes
    reads = {row.ref.name for row in order.rows if row.side == "reads"}
    assert reads >= {"expand.0.weight", "expand.1.weight", "head.weight"}


def spectrum(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    factor = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.T
    return covariance, torch.linalg.eigvalsh(covariance)


@pytest.mark.parametrize(("channels", "groups"), [(12, 4), (12, 6), (16, 8), (15, 3)])
def test_the_groups_lose_the_least_eigenvalues(channels: int, groups: int) -> None:
    covariance, values = spectrum(channels)
    _, vectors = torch.linalg.eigh(covariance)
    basis = mixing._grouping(channels, groups)
    torch.testing.assert_close(basis @ basis.T, torch.eye(channels, dtype=torch.float64))

    def lost(change: Tensor) -> float:
        mean = torch.block_diag(
            *[torch.full((channels // groups,) * 2, groups / channels)] * groups
        ).double()
        error = torch.linalg.inv(change) @ mean @ change
        return float((error @ covariance @ error.T).trace())

    least = float(values[:groups].sum())
    assert lost(basis @ vectors.T) == pytest.approx(least)
    for seed in range(5):
        other = torch.randn(
            channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        assert lost(other) > least
    # The negative twin: the largest eigenvectors first lose the largest eigenvalues.
    assert lost(basis @ vectors.flip(1).T) == pytest.approx(float(values[-groups:].sum()))


def builder(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision = pytest.importorskip("torchvision")
        model: nn.Module = getattr(torchvision.models, name)(num_classes=7)
        return model

    return build


@pytest.mark.parametrize(
    ("name", "expected"), [("mobilenet_v2", 17), ("efficientnet_b0", 16), ("mnasnet0_5", 17)]
)
def test_the_streams_of_inverted_residual_networks_are_mixed(
    name: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regroup, "regrouped", lambda means, groups: np.arange(len(means[0].weight)))
    torch.manual_seed(0)
    model = models.randomize_norms_(builder(name)().eval())
    item = BatchNormToGroupNorm(keep="function", num_groups=2)
    result = rewrite.convert(model, [item], calibration=[torch.randn(6, 3, 32, 32)], verify=False)
    mixed = [change for change in result.report.changes if "basis" in change.note]
    assert len(mixed) == expected, [c.note for c in result.report.changes if c not in mixed]
