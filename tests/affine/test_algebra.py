"""rewrite.affine.algebra: each identity against the layer it describes, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewrite.affine.algebra import Affine, KernelLayout, absorb, dirac, embed, offset, scale_weight

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
RIGHT, WRONG = 1e-12, 1e-3


def random_affine(channels: int) -> Affine:
    return Affine(
        torch.randn(channels, dtype=torch.float64) * 2, torch.randn(channels, dtype=torch.float64)
    )


def along_channels(affine: Affine, x: Tensor) -> Tensor:
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return affine.scale.view(shape) * x + affine.shift.view(shape)


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


geometry = st.fixed_dictionaries(
    {
        "dims": st.integers(1, 3),
        "groups": st.sampled_from([1, 2, 3]),
        "inputs": st.integers(1, 3),
        "outputs": st.integers(1, 3),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def make(geometry: dict[str, int], transposed: bool, **kwargs: object) -> nn.Module:
    torch.manual_seed(geometry["seed"])
    kinds = TRANSPOSED if transposed else CONVS
    return kinds[geometry["dims"]](
        geometry["inputs"] * geometry["groups"],
        geometry["outputs"] * geometry["groups"],
        geometry["kernel"],
        stride=geometry["stride"],
        dilation=geometry["dilation"],
        groups=geometry["groups"],
        bias=geometry["bias"],
        **kwargs,
    ).double()


def put(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)


@given(geometry=geometry, transposed=st.booleans())
def test_absorbs_what_is_behind(geometry: dict[str, int], transposed: bool) -> None:
    layer = make(geometry, transposed, padding=geometry["kernel"] // 2)
    x = torch.randn(2, layer.in_channels, *(7,) * geometry["dims"], dtype=torch.float64)
    affine = random_affine(layer.out_channels)
    want = along_channels(affine, layer(x))
    put(
        layer,
        *absorb(
            layer.weight, layer.bias, KernelLayout(layer.groups, transposed), output_side=affine
        ),
    )
    assert error(layer(x), want) < RIGHT


@given(geometry=geometry)
def test_absorbs_what_is_in_front(geometry: dict[str, int]) -> None:
    reflect = {"padding": geometry["kernel"] // 2, "padding_mode": "circular"}
    layer = make(geometry, False, **reflect)
    x = torch.randn(2, layer.in_channels, *(7,) * geometry["dims"], dtype=torch.float64)
    affine = random_affine(layer.in_channels)
    want = layer(along_channels(affine, x))
    put(layer, *absorb(layer.weight, layer.bias, KernelLayout(layer.groups), input_side=affine))
    assert error(layer(x), want) < RIGHT


@given(geometry=geometry)
def test_transposed_absorbs_a_scale_in_front(geometry: dict[str, int]) -> None:
    layer = make(geometry, True)
    x = torch.randn(2, layer.in_channels, *(4,) * geometry["dims"], dtype=torch.float64)
    affine = random_affine(layer.in_channels)
    affine = Affine(affine.scale, torch.zeros_like(affine.shift))
    want = layer(along_channels(affine, x))
    put(
        layer,
        *absorb(layer.weight, layer.bias, KernelLayout(layer.groups, True), input_side=affine),
    )
    assert error(layer(x), want) < RIGHT


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_single_tap_absorbs_a_shift_in_front(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 1, groups=groups).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    affine = random_affine(4)
    want = layer(along_channels(affine, x))
    put(layer, *absorb(layer.weight, layer.bias, KernelLayout(groups, True), input_side=affine))
    assert error(layer(x), want) < RIGHT


def test_zero_padding_does_not_absorb_a_shift() -> None:
    layer = nn.Conv2d(3, 4, 1, padding=1).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    affine = random_affine(3)
    want = layer(along_channels(affine, x))
    put(layer, *absorb(layer.weight, layer.bias, KernelLayout(), input_side=affine))
    assert error(layer(x), want) > WRONG


def test_both_sides_of_a_linear() -> None:
    layer = nn.Linear(5, 3, bias=False).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    front, behind = random_affine(5), random_affine(3)
    want = along_channels(behind, layer(along_channels(front, x)))
    put(layer, *absorb(layer.weight, None, KernelLayout(), behind, front))
    assert error(layer(x), want) < RIGHT


def test_no_bias_appears_for_a_scale() -> None:
    layer = nn.Conv2d(3, 4, 3, bias=False)
    scale = Affine(torch.full((4,), 2.0, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    weight, bias = absorb(layer.weight, None, KernelLayout(), output_side=scale)
    assert bias is None
    assert torch.equal(weight, layer.weight.detach() * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounds_once(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 32, 3, 3).to(dtype)
    scale = torch.randn(64, dtype=torch.float64)
    exact = weight.double() * scale.view(-1, 1, 1, 1)
    got = scale_weight(weight, KernelLayout(), scale, None)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))
    twice = weight * scale.to(dtype).view(-1, 1, 1, 1)
    assert not torch.equal(twice, exact.to(dtype))


def test_blocks_agree_with_the_whole() -> None:
    weight = torch.randn(700, 500, 3, 3)
    scale, front = torch.randn(700).double(), torch.randn(1000).double()
    want = weight.double() * scale.view(-1, 1, 1, 1)
    want = want * front.view(2, 1, 500, 1, 1).expand(2, 350, 500, 1, 1).reshape(700, 500, 1, 1)
    got = scale_weight(weight, KernelLayout(groups=2), scale, front)
    assert torch.allclose(got.double(), want, rtol=2**-23, atol=0)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (700, 500, 1, 1)])
def test_every_block_of_a_new_weight_is_shown(shape: tuple[int, ...]) -> None:
    shown: list[torch.Tensor] = []
    weight = torch.randn(shape)
    scale = torch.randn(shape[0]).double()
    got = scale_weight(weight, KernelLayout(), scale, None, see=shown.append)
    assert torch.equal(torch.cat(shown), got)


def test_a_map_is_finite_whatever_its_size_unless_one_value_is_none() -> None:
    large, nothing = torch.full((3,), 1e300, dtype=torch.float64), torch.zeros(3).double()
    assert Affine(large, large).finite
    for value in (math.inf, -math.inf, math.nan):
        broken = torch.tensor([0.0, value, 0.0], dtype=torch.float64)
        assert not Affine(broken, nothing).finite
        assert not Affine(nothing, broken).finite
        assert not Affine(large, broken).finite


def test_keeps_channels_last() -> None:
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    got = scale_weight(weight, KernelLayout(), torch.ones(8).double(), None)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_is_an_affine() -> None:
    norm = nn.BatchNorm2d(5, eps=1e-2).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.data.normal_()
    norm.running_var.uniform_(0.2, 3)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    affine = Affine.batch_norm(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    assert error(along_channels(affine, x), norm(x)) < RIGHT
    undone = along_channels(affine.inverse(), norm(x))
    assert error(undone, x) < RIGHT
    twice = along_channels(affine.after(affine), x)
    assert error(twice, norm(norm(x))) < RIGHT


def test_an_index_of_minus_one_is_the_identity() -> None:
    affine = random_affine(3).at(torch.tensor([2, -1, 0]))
    assert affine.scale[1] == 1
    assert affine.shift[1] == 0


@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
)
def test_parallel_kernels_add_up(groups: int, kernel: int, stride: int, dilation: int) -> None:
    padding = dilation * (kernel - 1) // 2
    wide = torch.randn(4, 4 // groups, kernel, kernel, dtype=torch.float64)
    point = torch.randn(4, 4 // groups, 1, 1, dtype=torch.float64)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    at = offset((1, 0), (kernel, padding), dilation)
    assert at is not None
    merged = wide + embed(point, (kernel, kernel), (at, at))
    merged = merged + dirac(4, groups, (kernel, kernel), (at, at))
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    want = F.conv2d(x, wide, padding=padding, **options)
    want = want + F.conv2d(x, point, **options) + x[:, :, ::stride, ::stride]
    assert error(F.conv2d(x, merged, padding=padding, **options), want) < RIGHT


def test_kernels_that_see_other_windows_have_no_offset() -> None:
    assert offset((1, 0), (3, 1), 1) == 1
    assert offset((1, 0), (3, 0), 1) is None
    assert offset((2, 0), (3, 1), 1) is None
    assert offset((5, 2), (3, 1), 1) is None
