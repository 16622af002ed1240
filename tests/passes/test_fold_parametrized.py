"""passes.fold on layers whose weight is computed: baked where a norm really folds, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import models
import rewrite
from passes import FoldNorm
from rewrite.errors import CheckpointError, OptionError
from rewrite.fold.replay import apply_report
from rewrite.runtime.copying import copy_model

RIGHT, WRONG = 1e-10, 1e-3


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def old_weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


def doubled(conv: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(conv, "weight", Doubled())


def both(conv: nn.Module) -> nn.Module:
    doubled(conv)
    return parametrize.register_parametrization(conv, "bias", Doubled())


def pruned(conv: nn.Module) -> nn.Module:
    return prune.l1_unstructured(conv, "weight", amount=0.3)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "doubled": doubled,
    "weight_and_bias": both,
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": pruned,
}


def build(kind: str, *behind: nn.Module, seed: int = 0) -> nn.Module:
    """Return conv -> norm (or what is given), the weight of conv computed."""
    torch.manual_seed(seed)
    conv = KINDS[kind](nn.Conv2d(3, 4, 3))
    model = nn.Sequential(conv, *(behind or (nn.BatchNorm2d(4),)))
    return models.randomize_norms_(model, seed).double().eval()


def image() -> Tensor:
    return torch.randn(2, 3, 7, 7, dtype=torch.float64)


def error(got: nn.Module, want: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return ((got(x) - want(x)).abs().max() / want(x).abs().max()).item()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def converted(model: nn.Module, x: Tensor, **options: str) -> tuple[nn.Module, rewrite.Report]:
    result = rewrite.convert(model, [FoldNorm(**options)], example_inputs=(x,))
    assert error(result.model, model, x) < RIGHT
    assert not result.report.passes[0].violations
    return result.model, result.report


@pytest.mark.parametrize("kind", KINDS)
def test_bakes_the_producer(kind: str) -> None:
    model, x = build(kind), image()
    folded, report = converted(model, x)
    assert norms(folded) == 0
    assert "baked 0.weight (" in report.changes[0].note
    assert type(folded[0]) is nn.Conv2d and set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert isinstance(folded[0].weight, nn.Parameter) and folded[0].weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_by_option(kind: str) -> None:
    model, x = build(kind), image()
    folded, report = converted(model, x, parametrized="refuse")
    assert norms(folded) == 1 and "parametrization" in report.skips[0].reason
    assert folded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_keeps_its_parametrization(kind: str) -> None:
    model, x = build(kind), image()
    before, keys = model(x), list(model.state_dict())
    converted(model, x)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys


def test_does_not_bake_where_nothing_folds() -> None:
    model, x = build("weight_norm", nn.ReLU(), nn.BatchNorm2d(4)), image()
    folded, report = converted(model, x)
    assert norms(folded) == 1 and not report.changes
    assert parametrize.is_parametrized(folded[0], "weight")


def test_a_frozen_producer_stays_frozen() -> None:
    model, x = build("weight_norm").requires_grad_(False), image()
    folded, _ = converted(model, x)
    assert not any(p.requires_grad for p in folded.parameters())


def test_bakes_the_norm_itself() -> None:
    model, x = models.build("parametrized_norm")[0], models.build("parametrized_norm")[1][0]
    folded, report = converted(model, x)
    assert norms(folded) == 0 and "baked bn.weight" in report.changes[0].note
    assert "bn.parametrizations.weight.original" in report.changes[0].keys


def test_a_wrong_bake_would_show() -> None:
    """The negative twin: the direction without the magnitude is another weight."""
    model, x = build("weight_norm"), image()
    twin = copy_model(model)
    twin[0].parametrizations.weight.original0.data.mul_(1.01)
    assert error(converted(twin, x)[0], model, x) > WRONG


def test_declines_a_weight_that_is_another_at_each_call() -> None:
    model = build("doubled")
    parametrize.register_parametrization(model[0], "weight", Noisy())
    applied = rewrite.convert(model, [FoldNorm()], verify=False).report
    assert "computes another weight at each call" in applied.skips[0].reason


def test_declines_a_layer_in_training_mode() -> None:
    model = build("spectral_norm")
    model[0].train()
    report = rewrite.convert(model, [FoldNorm()], verify=False).report
    assert "is in training mode" in report.skips[0].reason


def test_bakes_weight_and_bias_each_in_its_own_way() -> None:
    model = build("old_weight_norm")
    prune.l1_unstructured(model[0], "bias", amount=0.3)
    folded, report = converted(model, image())
    assert norms(folded) == 0
    words = "baked 0.weight (old-style WeightNorm), 0.bias (old-style L1Unstructured)"
    assert report.changes[0].note == words


def test_bakes_what_is_pruned_twice() -> None:
    model = build("pruned")
    prune.random_unstructured(model[0], "weight", amount=0.3)
    assert norms(converted(model, image())[0]) == 0


def test_declines_originals_that_are_shared() -> None:
    model, x = build("weight_norm", nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), image()
    other = parametrizations.weight_norm(nn.Conv2d(3, 4, 3)).double()
    other.parametrizations.weight.original1 = model[0].parametrizations.weight.original1

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Sequential(model[0], model[1]), other

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.one(x)) + self.other(x)

    folded, report = converted(Two().eval(), x)
    assert norms(folded) == 1 and "which is one tensor with" in report.skips[0].reason


def test_declines_originals_that_other_code_reads() -> None:
    model, x = build("weight_norm"), image()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = model[0], model[1]

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x))) * self.conv.weight.sum()

    folded, report = converted(Reads().eval(), x)
    assert norms(folded) == 1 and "is also read by" in report.skips[0].reason


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
def test_another_checkpoint_is_baked_by_the_map(kind: str) -> None:
    x = image()
    _, report = converted(build(kind), x)
    other = build(kind, seed=5)
    got = apply_report(json.loads(report.to_json()), other.state_dict())
    want = converted(other, x)[0].state_dict()
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[key], want[key], rtol=1e-12, atol=1e-14) for key in want)


def test_another_checkpoint_of_an_unknown_parametrization_is_refused() -> None:
    _, report = converted(build("doubled"), image())
    with pytest.raises(CheckpointError, match="is computed from other tensors"):
        apply_report(json.loads(report.to_json()), build("doubled", seed=5).state_dict())


def test_the_option_is_checked() -> None:
    with pytest.raises(OptionError, match="parametrized"):
        FoldNorm(parametrized="drop")
