"""passes.fold before a linear call whose bias other lines compute, and in forwards with options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import rewrite

WIDTH, RIGHT = 4, 1e-13


class Joined(nn.Module):
    """The bias of BEiT: parameters, and a buffer that no file keeps, put together at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 6, bias=False)
        self.q_bias = nn.Parameter(torch.randn(2))
        self.register_buffer("k_bias", torch.zeros(2), persistent=False)
        self.v_bias = nn.Parameter(torch.randn(2))

    def bias(self) -> Tensor:
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def forward(self, x: Tensor, scale: int = 1, extra: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight=self.qkv.weight, bias=self.bias())
        if extra is not None:
            y = y + extra
        if scale != 1:
            y = y * scale
        return y


class Model(nn.Module):
    """norm, and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = Joined()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x), extra=None, scale=1)


class ByPosition(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x), 1, None)


class OfTheValue(Model):
    """A bias that is computed from the normalized value itself."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 6)
        self.weight = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.linear(y, self.weight, self.other(y).mean((0, 1)).sin())


def fold(model: nn.Module) -> Any:
    torch.manual_seed(0)
    models.randomize_norms_(model).double().eval().requires_grad_(False)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    result = rewrite.convert(model, "fold", example_inputs=x)
    for given in (x, 100 * x, x[:1]):
        want, got = model(given), result.model(given)
        assert (got - want).abs().max() <= RIGHT * want.abs().max()
    assert all(torch.equal(before[key], held) for key, held in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    return result


@pytest.mark.parametrize("kind", [Model, ByPosition, OfTheValue])
def test_the_product_absorbs_the_norm_and_the_sum_its_shift(kind: type[Model]) -> None:
    result = fold(kind())
    assert [change.target for change in result.report.changes] == ["norm"]
    assert result.model.norm.weight is None


def test_what_was_folded_so_is_saved_loaded_and_converted_again(tmp_path: Path) -> None:
    model = Model()
    result = fold(model)
    rewrite.save(result.model, tmp_path / "model.pt")
    loaded = rewrite.load(tmp_path / "model.pt", trust=["tests"])
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    for one in (loaded, copy.deepcopy(loaded), rewrite.convert(loaded, "fold").model):
        assert (one(x) - model(x)).abs().max() <= RIGHT


def test_a_forward_holds_an_option_to_the_value_that_it_was_traced_with() -> None:
    inner = fold(Model()).model.inner
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    assert torch.equal(inner(x), inner(x, scale=1, extra=None))
    for options in ({"extra": torch.ones(6)}, {"scale": 2}):
        with pytest.raises(AssertionError, match="but got another value"):
            inner(x, **options)


class OtherValues(Model):
    """The call gives its options other values than their defaults."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x), 2, x[..., :1])


class Given(Model):
    """The call gives a tested argument, and its branch is taken at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x), extra=x[..., :1])


def test_an_argument_that_every_call_gives_stays_one(tmp_path: Path) -> None:
    model = Given()
    result = fold(model)
    assert len(result.report.changes) == 1
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    rewrite.save(result.model, tmp_path / "model.pt")
    loaded = rewrite.load(tmp_path / "model.pt", trust=["tests"])
    again = rewrite.convert(loaded, "fold", example_inputs=x).model
    for one in (result.model, loaded, again):
        assert (one(x) - model(x)).abs().max() <= RIGHT
    with pytest.raises(AssertionError, match="extra was given"):
        result.model.inner(x)


class ScaledBehind(Model):
    """A map behind a sum would have to scale the computed bias, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x.flatten(0, -2)).sin().asin())


class Twice(Model):
    """One weight, read by two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH))
        self.one, self.other = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first, second = self.biases()
        return F.linear(y, self.weight, first) - F.linear(y, self.weight, second).relu()


class TwoBiases(Twice):
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.one, self.other


class OneBias(Twice):
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.one, None


class ComputedAndNot(Twice):
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.one, self.one + self.other


class BothComputed(Twice):
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.one - self.other, self.one + self.other


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherValues, "which tests its argument scale"),
        (ScaledBehind, ""),
        (Twice, "there is no one bias to absorb a shift"),
        (TwoBiases, "weight is read with another bias at"),
        (OneBias, "weight is read with another bias at"),
        (ComputedAndNot, "weight is read with another bias at"),
        (BothComputed, "there is no one bias to absorb a shift"),
    ],
)
def test_what_two_calls_would_need_apart_stays(kind: type[Model], reason: str) -> None:
    result = fold(kind())
    (skip,) = result.report.skips
    assert not result.report.changes and reason in skip.reason


class SameBias(Twice):
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.one, self.one


def test_two_calls_with_one_weight_and_one_bias_absorb_the_norm() -> None:
    assert len(fold(SameBias()).report.changes) == 1


def resmlp() -> nn.Module:
    mixer = pytest.importorskip("timm.models.mlp_mixer")
    model: nn.Module = mixer.MlpMixer(
        img_size=32, patch_size=16, num_blocks=2, embed_dim=24, mlp_ratio=4,
        block_layer=mixer.ResBlock, norm_layer=mixer.Affine,
    )  # fmt: skip
    return model


def beit() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(
        "beit_base_patch16_224", img_size=32, embed_dim=24, depth=2
    )
    return model


def eva02() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=2
    )
    return model


@pytest.mark.parametrize(
    ("make", "size", "folded", "left"),
    [(resmlp, 32, 5, 4), (beit, 32, 9, 0), (eva02, 28, 4, 2)],
)
def test_models_of_timm(make: Callable[[], nn.Module], size: int, folded: int, left: int) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x)
    assert result.report.ok
    assert (len(result.report.changes), len(result.report.skips)) == (folded, left)
    with torch.no_grad():
        assert (result.model(3 * x) - model(3 * x)).abs().max() <= 1e-11
