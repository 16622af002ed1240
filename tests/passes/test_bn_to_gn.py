from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import rewrite
from passes import BatchNormToGroupNorm
from rewrite.errors import OptionError


def convert(
    model: nn.Module, *inputs: torch.Tensor, **options: object
) -> rewrite.Result[nn.Module]:
    return rewrite.convert(
        model, [BatchNormToGroupNorm(**options)], example_inputs=inputs or None, verify=bool(inputs)
    )  # fmt: skip


def conv_norm(channels: int = 8, **options: object) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, **options)).eval()
    return models.randomize_norms_(model, 0)


def test_rewrites_each_batch_norm_and_keeps_what_it_was() -> None:
    model = conv_norm(64, eps=1e-3).double().to(memory_format=torch.channels_last)
    model[1].weight.requires_grad_(False)
    norm = convert(model, torch.randn(2, 3, 8, 8).double(), keep="affine").model[1]
    assert type(norm) is nn.GroupNorm and norm.num_groups == 32 and norm.eps == 1e-3
    assert torch.equal(norm.weight, model[1].weight) and torch.equal(norm.bias, model[1].bias)
    assert norm.weight.dtype == torch.float64 and not norm.training
    assert not norm.weight.requires_grad and norm.bias.requires_grad


@pytest.mark.parametrize(
    ("dims", "shape"), [(1, (2, 8)), (1, (2, 8, 5)), (2, (2, 8, 5, 5)), (3, (2, 8, 3, 3, 3))]
)
def test_rewrites_every_dimension(dims: int, shape: tuple[int, ...]) -> None:
    kind = getattr(nn, f"BatchNorm{dims}d")
    model = models.randomize_norms_(nn.Sequential(nn.Identity(), kind(8)).eval(), 0)
    result = convert(model, torch.randn(shape), num_groups=2, keep="affine")
    x = torch.randn(shape)
    expected = F.group_norm(x, 2, model[1].weight, model[1].bias, model[1].eps)
    assert torch.equal(result.model(x), expected)
    wrong = F.group_norm(x, 2, torch.ones(8), torch.zeros(8), model[1].eps)
    assert not torch.allclose(result.model(x), wrong, atol=1e-3)


def test_rewrites_sync_and_materialized_lazy_norms() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    lazy(torch.randn(2, 3, 8, 8))
    assert type(convert(lazy.eval()).model[1]) is nn.GroupNorm
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(conv_norm())
    assert type(convert(sync).model[1]) is nn.GroupNorm


@pytest.mark.parametrize(
    ("channels", "options", "shape", "groups"),
    [
        (64, {}, None, 1),
        (64, {"keep": "affine"}, None, 32),
        (64, {"num_groups": 32}, None, 32),
        (48, {"num_groups": 32}, None, 24),
        (32, {"num_groups": 32}, None, 16),
        (32, {"num_groups": 32}, (2, 3, 8, 8), 32),
        (7, {"num_groups": 32}, None, 1),
        (24, {"num_groups": 16}, None, 12),
        (40, {"channels_per_group": 16}, None, 2),
        (64, {"channels_per_group": 16}, None, 4),
        (8, {"channels_per_group": 16}, None, 1),
    ],
)
def test_the_count_becomes_a_divisor_that_leaves_two_elements_a_group(
    channels: int, options: dict[str, Any], shape: tuple[int, ...] | None, groups: int
) -> None:
    inputs = () if shape is None else (torch.randn(shape),)
    result = convert(conv_norm(channels), *inputs, **options)
    assert result.model[1].num_groups == groups
    asked = options.get("num_groups", 32 if "keep" in options else 1)
    changed = groups != (channels // 16 if "channels_per_group" in options else asked)
    assert ("fit" in result.report.changes[0].note) == changed or channels == 8


def test_strict_makes_a_count_that_does_not_divide_an_error() -> None:
    with pytest.raises(
        OptionError, match="1: 48 channels are not divisible by 32 groups; pass num"
    ):
        convert(conv_norm(48), num_groups=32, strict=True)
    assert convert(conv_norm(64), num_groups=32, strict=True).model[1].num_groups == 32


def test_narrow_layers_get_fewer_groups_where_a_group_has_a_least_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 8, 3),
                          nn.BatchNorm2d(8)).eval()  # fmt: skip
    result = rewrite.convert(
        model, [BatchNormToGroupNorm(min_channels=16)], example_inputs=(torch.randn(2, 3, 9, 9),)
    )
    assert [result.model[1].num_groups, result.model[3].num_groups] == [4, 1]
    told = "32 groups asked, 4 fit 64 channels with at least 16 a group"
    assert told in result.report.changes[0].note
    plain = rewrite.convert(model, [BatchNormToGroupNorm(num_groups=32)], verify=False).model
    assert [plain[1].num_groups, plain[3].num_groups] == [32, 4]
    with pytest.raises(OptionError, match="goes with num_groups"):
        BatchNormToGroupNorm(channels_per_group=4, min_channels=2)


def test_on_flat_input_no_group_has_one_channel() -> None:
    """GroupNorm with one channel a group on (N, C) puts out its bias, whatever comes in."""
    model = models.randomize_norms_(nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32)).eval(), 0)
    norm = convert(model, torch.randn(4, 4), num_groups=32).model[1]
    assert norm.num_groups == 16
    x = torch.randn(2, 32)
    assert not torch.allclose(norm(x)[0], norm(x)[1], atol=1e-1)
    trap = F.group_norm(x, 32, norm.weight, norm.bias)
    assert torch.allclose(trap[0], trap[1], atol=1e-3)


def test_declines_one_channel_without_known_positions() -> None:
    skips = convert(conv_norm(1)).report.skips
    assert [s.reason for s in skips] == [
        "has 1 channel and an unknown number of positions: a group of one element would output β"
    ]
    assert convert(conv_norm(1), torch.randn(1, 3, 8, 8)).report.changes


def test_a_norm_without_affine_stays_without() -> None:
    result = convert(conv_norm(8, affine=False), keep="affine")
    assert result.model[1].weight is None and not result.model[1].affine
    assert "no γ and β" in result.report.changes[0].note


def test_a_norm_without_bias_stays_without() -> None:
    result = convert(conv_norm(8, bias=False), keep="affine")
    assert result.model[1].bias is None and result.model[1].weight is not None


def test_a_subclass_keeps_its_activation() -> None:
    timm = pytest.importorskip("timm")
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    ).eval()
    models.randomize_norms_(block, 0)
    x = torch.randn(2, 3, 8, 8)
    new = convert(block, x, num_groups=2, keep="affine").model
    expected = F.silu(F.group_norm(block[0](x), 2, block[1].weight, block[1].bias, block[1].eps))
    assert torch.equal(new(x), expected)
    assert type(new[1]) is nn.Sequential and list(new[1]._modules) == ["norm", "drop", "act"]
    lost = F.group_norm(block[0](x), 2, block[1].weight, block[1].bias, block[1].eps)
    assert not torch.allclose(new(x), lost, atol=1e-2)


@pytest.mark.parametrize("name", ["functional_norm", "torch_norm", "norm_calls_super"])
def test_a_line_of_a_forward_is_replaced_in_its_owner(name: str) -> None:
    model, inputs = models.build(name)
    result = rewrite.convert(
        model, [BatchNormToGroupNorm(num_groups=2, keep="affine")], example_inputs=inputs
    )
    assert len(result.report.changes) == 1 and result.report.ok
    assert sum(isinstance(m, nn.GroupNorm) for m in result.model.modules()) == 1
    assert not torch.allclose(result.model(*inputs), model(*inputs))


def test_a_norm_under_two_names_stays_one_module() -> None:
    model, inputs = models.build("norm_under_two_names")
    result = rewrite.convert(model, [BatchNormToGroupNorm()], example_inputs=inputs)
    assert result.model.norm1 is result.model.norm2
    assert type(result.model.norm2) is nn.GroupNorm and result.report.ok


@pytest.mark.parametrize("name", ["hook_on_norm", "pre_hook_on_norm", "parametrized_norm"])
def test_declines_hooks_and_parametrizations(name: str) -> None:
    model, inputs = models.build(name)
    report = rewrite.convert(model, [BatchNormToGroupNorm()], example_inputs=inputs).report
    assert not report.changes
    assert [skip.target for skip in report.skips] == ["bn"]
    assert "hook" in report.skips[0].reason or "parametrization" in report.skips[0].reason


def test_declines_a_lazy_norm_without_input_and_a_frozen_one() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), FrozenBatchNorm2d(4))
    reasons = {skip.target: skip.reason for skip in convert(model).report.skips}
    assert "run one batch" in reasons["1"] and "no batch statistics" in reasons["2"]


@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_mode_of_each_norm(training: bool) -> None:
    model = conv_norm()
    model[1].train(training)
    assert convert(model, torch.randn(2, 3, 8, 8)).model[1].training is training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_half_precision(dtype: torch.dtype) -> None:
    model = conv_norm().to(dtype)
    result = convert(model, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert result.model[1].weight.dtype == dtype and result.report.ok


def test_leaves_the_rest_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True))
    result = convert(model, torch.randn(2, 3, 8, 8))
    assert not result.report.changes and not result.report.skips
    assert [type(a) for a in model] == [type(b) for b in result.model]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 0}, "num_groups is 0"),
        ({"channels_per_group": -1}, "channels_per_group is -1"),
        ({"num_groups": 2, "channels_per_group": 2}, "not both"),
    ],
)
def test_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BatchNormToGroupNorm(**options)


def test_extreme_statistics_stay_finite() -> None:
    model, inputs = models.build("extreme_statistics")
    result = rewrite.convert(model, [BatchNormToGroupNorm()], example_inputs=inputs)
    assert result.report.ok and torch.isfinite(result.model(*inputs)).all()


def test_the_printed_graph_before_and_after() -> None:
    model = torch.fx.symbolic_trace(conv_norm(8))
    assert BatchNormToGroupNorm(num_groups=2, keep="affine")(model).modified
    code = model.code.strip()
    assert 'getattr(self, "0")' in code and 'getattr(self, "1")' in code
    assert repr(model.get_submodule("1")) == "GroupNorm(2, 8, eps=1e-05, affine=True, bias=True)"
    assert not BatchNormToGroupNorm()(model).modified


@pytest.mark.filterwarnings("ignore")
def test_declines_norms_inside_a_layer_fused_for_quantization():
    fused = torch.ao.nn.intrinsic.qat.ConvBn2d(
        4, 4, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    )
    model = nn.Sequential(fused, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 4, 3, 3)
    result = convert(model, x)
    assert [change.target for change in result.report.changes] == ["2"]
    (skip,) = result.report.skips
    assert skip.target == "0.bn"
    assert "convert the float model" in skip.reason
    assert result.model(x).isfinite().all()
