"""Fans against the sparsity of the Jacobian, and layouts against the maps they describe."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rewrite.weights.fans import linear_maps


class Conv1D(nn.Module):
    """The layer of this name in transformers: a Linear, stored transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def connectivity(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Return which output reads which input, as booleans of shape (outputs..., inputs...)."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    layer.double()
    jacobian = torch.autograd.functional.jacobian(layer, torch.ones(shape, dtype=torch.float64))
    return jacobian != 0


def central(counts: torch.Tensor, period: tuple[int, ...], margin: tuple[int, ...]) -> float:
    """Average counts of shape (1, channels, *space) over one period of positions in the middle."""
    for axis, (step, edge) in enumerate(zip(period, margin, strict=True), start=2):
        counts = counts.narrow(axis, edge, step)
    return counts.double().mean().item()


@st.composite
def convolutions(draw, transposed):
    dims = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2, 3]))
    sizes = st.tuples(*[st.integers(1, 3)] * dims)
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)
    return kinds[dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        draw(sizes),
        stride=draw(sizes),
        dilation=dilation,
        groups=groups,
        bias=False,
    )


@settings(max_examples=25)
@given(convolutions(transposed=False))
def test_convolution_fans_count_connections(conv):
    reach = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    # As many positions as one interior period and a kernel's reach on either side need.
    size = [2 * r + 2 * s + 1 for r, s in zip(reach, conv.stride, strict=True)]
    connected = connectivity(conv, (1, conv.in_channels, *size))
    outputs = connected.dim() // 2
    reads = connected.flatten(outputs).sum(-1)
    fed = connected.flatten(0, outputs - 1).sum(0)
    (linear_map,) = linear_maps(conv)
    assert reads.unique().tolist() == [linear_map.fan_in]
    assert central(fed, conv.stride, tuple(reach)) == pytest.approx(linear_map.fan_out, rel=1e-12)


@settings(max_examples=25)
@given(convolutions(transposed=True))
def test_transposed_convolution_fans_count_connections(conv):
    reach = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    size = [2 * math.ceil(r / s) + 2 for r, s in zip(reach, conv.stride, strict=True)]
    connected = connectivity(conv, (1, conv.in_channels, *size))
    outputs = connected.dim() // 2
    reads = connected.flatten(outputs).sum(-1)
    fed = connected.flatten(0, outputs - 1).sum(0)
    (linear_map,) = linear_maps(conv)
    assert fed.unique().tolist() == [linear_map.fan_out]
    assert central(reads, conv.stride, tuple(reach)) == pytest.approx(linear_map.fan_in, rel=1e-12)


def test_torch_is_wrong_where_we_differ():
    depthwise = nn.Conv2d(64, 64, 3, groups=64)
    transposed = nn.ConvTranspose2d(4, 64, 3)
    torchs = nn.init._calculate_fan_in_and_fan_out
    assert torchs(depthwise.weight) == (9, 576)
    assert (linear_maps(depthwise)[0].fan_in, linear_maps(depthwise)[0].fan_out) == (9, 9)
    assert torchs(transposed.weight) == (576, 36)
    assert (linear_maps(transposed)[0].fan_in, linear_maps(transposed)[0].fan_out) == (36, 576)


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [(nn.Linear(5, 3), 5, 3), (Conv1D(3, 5), 5, 3), (nn.Conv2d(8, 4, 1, stride=2), 8, 1)],
)
def test_fans_of_plain_layers(layer, fan_in, fan_out):
    (linear_map,) = linear_maps(layer)
    assert (linear_map.fan_in, linear_map.fan_out) == (fan_in, fan_out)


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_dense_fans_count_connections(layer):
    connected = connectivity(layer, (1, 5)).reshape(3, 5)
    (linear_map,) = linear_maps(layer)
    assert connected.sum(1).tolist() == [linear_map.fan_in] * 3
    assert connected.sum(0).tolist() == [linear_map.fan_out] * 5


def test_an_embedding_reads_one_row():
    (linear_map,) = linear_maps(nn.Embedding(100, 7))
    assert (linear_map.fan_in, linear_map.fan_out) == (1, 7)


def test_every_gate_is_a_map_of_its_own():
    lstm = nn.LSTM(5, 8, num_layers=2, bidirectional=True, proj_size=3)
    maps = {m.label: m for m in linear_maps(lstm)}
    assert set(maps) >= {"weight_ih_l0[f]", "weight_hh_l1_reverse[o]", "weight_hr_l0"}
    assert (maps["weight_ih_l0[f]"].fan_in, maps["weight_ih_l0[f]"].fan_out) == (5, 8)
    assert (maps["weight_ih_l1[f]"].fan_in, maps["weight_hh_l1[g]"].fan_in) == (6, 3)
    assert (maps["weight_hr_l0"].fan_in, maps["weight_hr_l0"].fan_out) == (8, 3)
    assert maps["weight_ih_l0[f]"].rows == (8, 16)
    for linear_map in maps.values():
        block = linear_map.block(getattr(lstm, linear_map.parameter))
        assert tuple(block.shape) == (linear_map.fan_out, linear_map.fan_in)
    assert {m.parameter for m in maps.values()} == {
        n for n, _ in lstm.named_parameters() if n.startswith("weight")
    }


@pytest.mark.parametrize("cell", [nn.RNNCell(4, 3), nn.GRUCell(4, 3), nn.LSTMCell(4, 3)])
def test_cells_have_the_gates_of_their_layer(cell):
    rows = {"weight_ih": 0, "weight_hh": 0}
    for linear_map in linear_maps(cell):
        assert linear_map.fan_out == 3
        rows[linear_map.parameter] += 3
    assert rows == {"weight_ih": cell.weight_ih.shape[0], "weight_hh": cell.weight_hh.shape[0]}


def test_packed_attention_is_three_maps():
    packed = linear_maps(nn.MultiheadAttention(8, 2))
    assert [(m.part, m.fan_in, m.fan_out, m.rows) for m in packed] == [
        ("q", 8, 8, (0, 8)),
        ("k", 8, 8, (8, 16)),
        ("v", 8, 8, (16, 24)),
    ]
    apart = linear_maps(nn.MultiheadAttention(8, 2, kdim=3, vdim=5))
    assert [(m.parameter, m.fan_in, m.fan_out) for m in apart] == [
        ("q_proj_weight", 8, 8),
        ("k_proj_weight", 3, 8),
        ("v_proj_weight", 5, 8),
    ]


def test_layers_without_a_linear_map_have_none():
    for layer in (nn.ReLU(), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(2, 2))):
        assert linear_maps(layer) == ()
