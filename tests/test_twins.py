"""Negative controls of the passes that replace a norm or its numbers: freeze, sync, weight norm.

As in test_diverge.py a twin is wrong in one place: a norm tampered with before a right pass, or the
pass's result tampered with. A pass that redefines the function is held to less, and its twins break
that: shape, dtype, finiteness, determinism, and what it may not touch.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
import rewrite
from passes import (
    BatchNormToSyncBatchNorm,
    BatchNormToWeightNorm,
    FreezeBatchNorm,
    RecalibrateBatchNorm,
    Reinitialize,
    SyncBatchNormToBatchNorm,
)
from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import check_untouched, verify
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model
from rewrite.runtime.tree import Tree
from tests.equivalence.test_divergence import ERRORS, batch_norms, gamma_off_in, norm_models

PASSES = {
    "freeze-bn": FreezeBatchNorm(),
    "bn-to-sync-bn": BatchNormToSyncBatchNorm(),
    "sync-bn-to-bn": SyncBatchNormToBatchNorm(),
    "bn-to-weight-norm": BatchNormToWeightNorm(),
    "mean-only": BatchNormToWeightNorm(mean_only=True),
}


def prepared(name: str, kind: str) -> tuple[nn.Module, tuple]:
    """Return a reference model in eval mode that the pass finds something in."""
    model, inputs = models.build(name)
    model.eval()
    if kind == "sync-bn-to-bn":
        model = rewrite.convert(model, [BatchNormToSyncBatchNorm()], verify=False).model
    return model, inputs


def rewritten(model: nn.Module, kind: str, inputs: tuple) -> tuple[nn.Module, dict[str, str]]:
    result = rewrite.convert(model, [PASSES[kind]], example_inputs=inputs, verify=False)
    return result.model, {n: kind for change in result.report.changes for n in change.touched}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", norm_models(16))
def test_a_wrong_norm_is_caught_behind_its_pass(name, kind, error):
    model, inputs = prepared(name, kind)
    right, touched = rewritten(model, kind, inputs)
    assert verify(model, right, inputs, touched=touched, level=Level.QUICK).ok
    target = next((n for n in batch_norms(model) if n in touched), None)
    if target is None:
        pytest.skip(f"{kind} rewrites no module of {name}")
    wrong = copy_model(model)
    error(Tree(wrong).get(target))
    twin, touched = rewritten(wrong, kind, inputs)
    found = verify(model, twin, inputs, touched=touched, level=Level.QUICK)
    assert not found.ok
    assert found.divergence is not None
    assert found.divergence.target in places(model, kind, inputs, target)
    assert found.divergence.rewrite == kind


def places(model: nn.Module, kind: str, inputs: tuple, target: str) -> set[str]:
    """Return the modules that one norm's rewrite touches."""
    changes = rewrite.convert(model, [PASSES[kind]], example_inputs=inputs, verify=False)
    return {target}.union(*(c.touched for c in changes.report.changes if target in c.touched))


# -- a pass that goes wrong itself -----------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.norm1(self.first(x)))
        return torch.tanh(self.norm2(self.second(x)))


X = (torch.linspace(-2, 2, 4 * 3 * 64).sin().reshape(4, 3, 8, 8),)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def net(request) -> nn.Module:
    torch.manual_seed(0)
    return models.randomize_norms_(Net()).to(request.param).eval()


def inputs_of(model: nn.Module) -> tuple[torch.Tensor]:
    return (X[0].to(model.first.weight),)


def scaled(name: str, key: str):
    def change(model: nn.Module) -> None:
        owner = model.get_submodule(name)
        value = owner.get_parameter(key).detach().clone()
        value[1] *= 1 + 1e-4
        owner.get_parameter(key).data = value

    return change


def swapped(name: str, *keys: str):
    def change(model: nn.Module) -> None:
        owner = model.get_submodule(name)
        for key in keys:
            parameter = owner.get_parameter(key)
            parameter.data = parameter.detach()[[1, 0, *range(2, len(parameter))]].clone()

    return change


def bias_unscaled(model: nn.Module) -> None:
    """Leave the running mean out of the scale: t = beta - mu instead of beta - s mu."""
    gone = 0.1 * (1 - model.norm2.weight.detach())
    model.norm2.bias = nn.Parameter(model.norm2.bias.detach() + gone)


def eps(model: nn.Module) -> None:
    model.norm2.eps = 0.0


def lost(model: nn.Module) -> None:
    model.act = nn.Identity()


G, V, M = ("parametrizations.weight.original0", "parametrizations.weight.original1", "running_mean")
RESULTS = [
    ("freeze-bn", scaled("norm2", "weight"), "norm2"),
    ("freeze-bn", scaled("norm1", "bias"), "norm1"),
    ("freeze-bn", swapped("norm2", "weight", "bias"), "norm2"),
    ("freeze-bn", bias_unscaled, "norm2"),
    ("freeze-bn", lost, "act"),
    ("bn-to-sync-bn", scaled("norm1", "weight"), "norm1"),
    ("bn-to-sync-bn", swapped("norm2", "weight", "bias"), "norm2"),
    ("bn-to-sync-bn", bias_unscaled, "norm2"),
    ("bn-to-sync-bn", eps, "norm2"),
    ("bn-to-sync-bn", lost, "act"),
    ("bn-to-weight-norm", scaled("second", G), "second"),
    ("bn-to-weight-norm", scaled("first", "bias"), "first"),
    ("bn-to-weight-norm", swapped("second", G), "second"),
    ("bn-to-weight-norm", swapped("first", V), "first"),
    ("bn-to-weight-norm", lost, "act"),
    ("mean-only", scaled("second", G), "second"),
    # The convolution has no bias left, so its output is new: the site parts there.
    ("mean-only", scaled("norm2", "bias"), "second"),
    ("mean-only", swapped("norm1", "bias"), "first"),
]


@pytest.mark.parametrize(("kind", "spoil", "where"), RESULTS)
def test_a_wrong_result_is_caught_and_located(net, kind, spoil, where):
    inputs = inputs_of(net)
    twin, touched = rewritten(net, kind, inputs)
    assert verify(net, twin, inputs, touched=touched, level=Level.QUICK).ok
    spoil(twin)
    found = verify(net, twin, inputs, touched=touched, level=Level.QUICK)
    assert not found.ok
    assert found.divergence.target == where
    assert (found.divergence.rewrite == kind) == (where != "act")


def test_torch_s_own_conversion_loses_an_activation_and_is_located():
    """What bn-to-sync-bn is for: convert_sync_batchnorm replaces a norm with an activation."""
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8), nn.Conv2d(8, 4, 3))
    models.randomize_norms_(model.eval())
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(copy_model(model))
    found = verify(model, plain, X, level=Level.QUICK)
    assert not found.ok
    assert found.divergence.target.startswith("1")
    right = rewrite.convert(model, [BatchNormToSyncBatchNorm()], verify=False).model
    assert verify(model, right, X, level=Level.QUICK).ok


def test_a_frozen_norm_that_gained_a_channel_s_error_is_caught_behind_a_clamp(net):
    with torch.no_grad():
        net.norm1.bias[2] = -50
    wrong = copy_model(net)
    gamma_off_in(wrong.norm1, 2)
    twin, touched = rewritten(wrong, "freeze-bn", inputs_of(net))
    found = verify(net, twin, inputs_of(net), touched=touched, level=Level.QUICK)
    assert found.divergence.target == "norm1"


# -- passes that redefine the function -------------------------------------------------------------


class Restless(nn.Module):
    """Adds how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x + self.runs


def head(model: nn.Module) -> None:
    model.second, model.norm2 = nn.Conv2d(6, 5, 3).to(model.first.weight), nn.Identity()


def narrower(model: nn.Module) -> None:
    model.second = nn.Conv2d(5, 4, 3).to(model.first.weight)


def not_a_number(model: nn.Module) -> None:
    with torch.no_grad():
        model.norm2.weight[1] = float("nan")


def infinite(model: nn.Module) -> None:
    with torch.no_grad():
        model.second.bias[0] = float("inf")
        model.norm2.weight[0] = 0


def other_type(model: nn.Module) -> None:
    model.norm2.register_forward_hook(lambda _module, _given, made: made.half())


def restless(model: nn.Module) -> None:
    model.norm1 = nn.Sequential(model.norm1, Restless())


FORMS = [
    (head, "shape"),
    (narrower, "the rewritten model fails"),
    (not_a_number, "not finite"),
    (infinite, "not finite"),
    (other_type, "float16"),
    (restless, "two runs"),
]
REDEFINING = {"recalibrate-bn": RecalibrateBatchNorm(), "reinit": Reinitialize()}


@pytest.mark.parametrize(("spoil", "word"), FORMS)
@pytest.mark.parametrize("kind", REDEFINING)
def test_a_redefined_model_keeps_its_form(net, kind, spoil, word):
    inputs = inputs_of(net)
    result = rewrite.convert(
        net, [REDEFINING[kind]], example_inputs=inputs, calibration=[inputs[0]]
    )
    assert result.report.ok, str(result.report)
    assert result.report.changes
    twin = result.model
    assert verify(net, twin, inputs, contract=Contract.REDEFINING).ok
    spoil(twin)
    found = verify(net, twin, inputs, contract=Contract.REDEFINING)
    assert not found.ok
    assert word in str(found)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (scaled("first", "weight"), "first.weight"),
        (scaled("norm2", "weight"), "norm2.weight"),
        (swapped("second", "bias"), "second.bias"),
    ],
)
def test_recalibration_that_touches_a_layer_is_located(net, change, where):
    """It may set statistics alone, so what else moved is named."""
    inputs = inputs_of(net)
    result = rewrite.convert(net, [RecalibrateBatchNorm()], calibration=[inputs[0]], verify=False)
    touched = {f"{name}.{key}" for name in ("norm1", "norm2") for key in (M, "running_var")}
    assert set(check_untouched(net, result.model, ())) == touched
    change(result.model)
    assert set(check_untouched(net, result.model, ())) == {*touched, where}


def test_a_reinit_that_goes_beyond_its_sites_is_located(net):
    result = rewrite.convert(net, [Reinitialize()], only=["second"], verify=False)
    touched = [name for change in result.report.changes for name in change.touched]
    assert check_untouched(net, result.model, touched) == []
    scaled("first", "weight")(result.model)
    assert check_untouched(net, result.model, touched) == ["first.weight"]
