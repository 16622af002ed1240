"""ConjugationMaps around a norm: the algebra, and models that keep more by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from passes import BatchNormToGroupNorm
from rewrite.errors import OptionError
from rewrite.grouping import regroup
from rewrite.grouping.low_rank import ConjugationMaps, low_rank_maps
from rewrite.nn.modules import ChannelMix
from rewrite.swap.anchor import gain


def positive(blocks: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(blocks, size, 2 * size, generator=generator, dtype=torch.float64)
    return factor @ factor.mT / size


def lost(maps: ConjugationMaps, covariance: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Return E |H error|² of each block, for the means of groups between the maps."""
    size = covariance.shape[1]
    mean = torch.block_diag(*[torch.full((size // rank,) * 2, rank / size)] * rank).double()
    inverse = torch.eye(size, dtype=torch.float64) - maps.back @ maps.down
    error = inverse @ mean @ maps.matrix
    return torch.einsum("bij,bjk,blk,bil->b", error, covariance, error, metric)


@pytest.mark.parametrize(("size", "rank"), [(12, 1), (12, 2), (12, 6), (16, 4), (7, 1)])
def test_the_groups_between_lose_the_least_eigenvalues(size: int, rank: int) -> None:
    covariance, metric = positive(3, size, 0), positive(3, size, 1)
    maps = low_rank_maps(covariance, metric, rank)
    eye = torch.eye(size, dtype=torch.float64)
    product = maps.matrix @ (eye - maps.back @ maps.down)
    assert (product - eye).abs().max() < 1e-12
    values = torch.linalg.eigvals(metric @ covariance).real.sort(dim=1).values
    least = values[:, :rank].sum(1)
    torch.testing.assert_close(lost(maps, covariance, metric, rank), least, rtol=1e-4, atol=0)
    # The negative twin: fitted to another covariance, more is lost.
    other = low_rank_maps(positive(3, size, 2), metric, rank)
    assert bool((lost(other, covariance, metric, rank) > 1.01 * least).all())


def test_degenerate_statistics_give_finite_maps() -> None:
    nothing = torch.zeros(2, 8, 8, dtype=torch.float64)
    ones = torch.ones(2, 8, 8, dtype=torch.float64)
    for covariance in (nothing, ones):
        for metric in (nothing, ones):
            maps = low_rank_maps(covariance, metric, 2)
            assert all(bool(torch.isfinite(t).all()) for t in (maps.up, maps.down, maps.back))
            assert torch.linalg.cond(maps.matrix).max() < 1e4


# -- models -----------------------------------------------------------------------------------


class Act(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    norm = Act(16) if kind == "own forward" else nn.BatchNorm2d(16)
    layers: list[nn.Module] = [
        nn.Conv2d(4, 16, 1, bias=kind == "bias"), norm, nn.ReLU6(),
        nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.SiLU(),
        nn.Conv2d(16, 8, 1), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 9, 5),
    ]  # fmt: skip
    if kind == "one norm twice":
        layers[4] = norm
    return models.randomize_norms_(nn.Sequential(*layers).double().eval())


def data(seed: int, *, channels: int = 4, dims: int = 2, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (48, channels, *(1,) * dims)
    wide = (48, channels, *(side,) * dims)
    means = torch.randn(shape, generator=generator, dtype=torch.float64)
    return means + torch.randn(wide, generator=generator, dtype=torch.float64)


def converted(model: nn.Module, *batches: Tensor, **options: Any) -> rewrite.Result[nn.Module]:
    item = BatchNormToGroupNorm(**{"keep": "function", "num_groups": 4, "mix": 4, **options})
    return rewrite.convert(model, [item], calibration=batches or [data(1)], verify=False)


def error(model: nn.Module, changed: nn.Module, x: Tensor | None = None) -> float:
    x = data(2) if x is None else x
    with torch.no_grad():
        old = model(x)
        return float((changed(x) - old).norm() / (old - old.mean(0)).norm())


def without_means_(model: nn.Module) -> int:
    """Let every group norm do what it would if it took nothing away; return how many there are."""

    def plain(module: nn.Module, args: Sequence[Tensor], output: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        weight = module.weight / gain(30)
        return args[0] * weight.reshape(-1, *(1,) * (args[0].dim() - 2))

    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    for norm in norms:
        norm.register_forward_hook(plain)
    return len(norms)


@pytest.mark.parametrize("mix", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "bias", "own forward", "one norm twice"])
def test_the_maps_cancel(kind: str, mix: int) -> None:
    model = network(kind)
    changed = converted(model, mix=mix).model
    assert without_means_(changed) == (2 if kind == "one norm twice" else 3)
    assert error(model, changed) < 1e-11
    # The negative twin: one map that is not the inverse of the other.
    mixes = [module for module in changed.modules() if isinstance(module, ChannelMix)]
    mixes[-1].up.data.mul_(1.1)
    assert error(model, changed) > 1e-3


def test_dead_and_negative_scales_are_exact_too() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight[:5] = 0
        model[4].weight.neg_()
        model[8].running_var[0] = 0
    changed = converted(model).model
    without_means_(changed)
    assert error(model, changed) < 1e-9
    assert all(bool(torch.isfinite(p).all()) for p in changed.parameters())


def test_a_model_keeps_far_more_between_maps() -> None:
    model = network()
    without, one, four = (error(model, converted(model, mix=mix).model) for mix in (0, 1, 4))
    assert four < 0.5 * without
    assert four < one < without


def test_the_report_says_which_norms_have_maps_and_where_the_first_went() -> None:
    result = converted(network(), mix=2)
    notes = [change.note for change in result.report.changes]
    assert "maps of rank 2 behind it and in 0, 2 blocks of channels" in notes[0]
    assert "maps of rank 2 around it, 2 blocks of channels" in notes[1]
    assert "0" in result.report.changes[0].touched
    assert isinstance(result.model[1].norm, nn.GroupNorm)
    assert not hasattr(result.model[1], "mix")
    assert isinstance(result.model[4].mix, ChannelMix)
    assert isinstance(result.model[8].norm.mix, ChannelMix)  # Behind the affine of a ReLU.


def test_a_norm_that_can_have_none_says_why() -> None:
    item = BatchNormToGroupNorm(keep="function", num_groups=16, mix=4)
    result = rewrite.convert(
        network(), [item], example_inputs=(data(2),), calibration=[data(1)], verify=False
    )
    for change in result.report.changes:
        assert "the mean of each channel is lost: one channel a group" in change.note
    assert not any(isinstance(module, ChannelMix) for module in result.model.modules())
    half = network().half()
    with torch.no_grad():
        half[1].weight.fill_(3000)
    limited = converted(half, data(1).half()).report.changes[0]
    assert "no maps around it: its anchor is too small" in limited.note


def test_streams_that_may_take_another_basis_do_that_instead() -> None:
    torch.manual_seed(0)
    model = models.randomize_norms_(
        nn.Sequential(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)).eval()
    )
    result = converted(model.double())
    assert "in another basis" in result.report.changes[0].note
    assert not any(isinstance(module, ChannelMix) for module in result.model.modules())


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_any_number_of_axes_does(dims: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 16) if dims == 0 else {1: nn.Conv1d, 3: nn.Conv3d}[dims](4, 16, 1)
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims](16)
    model = models.randomize_norms_(nn.Sequential(layer, norm, nn.ReLU()).double().eval())
    batch, other = data(1, dims=dims, side=4), data(2, dims=dims, side=4)
    changed = converted(model, batch).model
    plain = converted(model, batch, mix=0).model
    assert error(model, changed, other) < 0.8 * error(model, plain, other)
    without_means_(changed)
    assert error(model, changed, other) < 1e-11


def test_a_frozen_norm_has_frozen_maps_and_others_train() -> None:
    model = network()
    for parameter in model[4].parameters():
        parameter.requires_grad_(False)
    changed = converted(model).model
    assert not any(p.requires_grad for p in changed[4].parameters())
    changed.train()(data(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in changed[1].unmix.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_costs_no_more_than_it_costs_the_model(dtype: torch.dtype) -> None:
    model = network()
    changed = converted(model.float()).model.to(dtype)
    exact = converted(model.double()).model
    x = data(2)
    with torch.no_grad():
        drift = float((changed(x.to(dtype)).double() - exact(x)).norm() / exact(x).norm())
    assert drift < 20 * torch.finfo(dtype).eps


def test_the_rest_of_the_model_is_bit_identical() -> None:
    model = network()
    result = converted(model)
    touched = {name for change in result.report.changes for name in change.touched}
    changed = result.model.state_dict()
    assert torch.equal(changed["11.weight"], model.state_dict()["11.weight"])
    assert not {"6", "11"} & (touched - {change.target for change in result.report.changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": -1}, "mix is -1; pass 0 or more"),
        ({"keep": "statistics"}, "mix goes with keep=function, not statistics"),
        ({"anchor": 1.0}, "mix needs an anchor above 2.83"),
    ],
)
def test_options_that_do_not_fit_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        converted(network(), **options)


def test_it_exports_and_verifies(tmp_path: Any) -> None:
    model = network().float()
    changed = converted(model, data(1).float()).model
    example = data(2).float()[:2]
    found = rewrite.export(changed, tmp_path / "model.onnx", example_inputs=(example,))
    assert found, str(found)
    assert found.max_rel is not None and found.max_rel < 1e-5


ARCHITECTURES = (
    "resnet18", "resnet26d", "resnext26ts", "legacy_seresnet18", "densenet121", "efficientnet_b0",
    "mobilenetv3_small_050", "regnety_002", "hrnet_w18_small", "dla34", "vgg11_bn", "ghostnet_050",
    "mnasnet_050", "dpn48b", "selecsls42", "repvgg_a0", "res2net50_14w_8s", "inception_v3",
    "xception41", "cspresnet50", "ese_vovnet19b_slim", "tresnet_m", "levit_128s", "lcnet_050",
    "fbnetc_100", "mixnet_s", "skresnet18", "resnest14d", "repghostnet_050", "mobileone_s0",
    "fastvit_t8", "efficientvit_b0", "rexnet_100", "convmixer_768_32", "visformer_tiny",
    "mobilevit_xxs", "hardcorenas_a", "tinynet_e", "semnasnet_075", "spnasnet_100", "resnetv2_50",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_maps_cancel_in_architectures_of_timm(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(regroup, "can_mix", lambda *given: False)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    model = models.randomize_norms_(model).double()
    fixed = model.default_cfg.get("fixed_input_size")
    size = model.default_cfg["input_size"] if fixed else (3, 96, 96)
    x = torch.randn(4, *size, dtype=torch.float64)
    result = converted(model, x[:3], num_groups=None, channels_per_group=16)
    maps = sum("maps of rank" in change.note for change in result.report.changes)
    assert maps == len(result.report.changes) > 5
    without_means_(result.model)
    with torch.no_grad():
        old = model(x)
        assert (result.model(x) - old).norm() < 1e-11 * old.norm()
