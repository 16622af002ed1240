"""What absorbs a map: kernels, norms in eval mode and gains, and which of them keep a shift."""

from __future__ import annotations

import pytest
from torch import nn

from rewrite.affine.layers import attention_layer, layer_of
from rewrite.graph.capture import capture


def found(module: nn.Module, rank: int = 4):
    captured = capture(nn.Sequential(module))
    node = next(node for node in captured.nodes() if node.op == "call_module")
    return layer_of(captured, node, rank)


@pytest.mark.parametrize(
    ("module", "keeps", "why"),
    [
        (nn.Conv2d(3, 4, 3), True, ""),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), True, ""),
        (nn.Conv2d(3, 4, 3, padding="valid"), True, ""),
        (nn.Conv2d(3, 4, 1, padding="same"), True, ""),
        (nn.Conv2d(3, 4, 1, padding=1), False, "pads its input with zeros (padding=1)"),
        (nn.Conv2d(3, 4, 3, padding=(0, 1)), False, "zeros (padding=(0, 1))"),
        (nn.Conv2d(3, 4, 3, padding="same"), False, "zeros (padding=same)"),
        (nn.ConvTranspose2d(3, 4, 1), True, ""),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), False, "each output of the transposed"),
        (nn.ConvTranspose2d(3, 4, 1, stride=2), False, "each output of the transposed"),
    ],
)
def test_a_shift_passes_a_convolution_whose_border_it_reaches(module, keeps, why) -> None:
    layer = found(module)
    assert layer is not None and layer.kind == "kernel"
    assert layer.keeps_shift is keeps and why in layer.why_not
    assert (layer.channels_in, layer.channels_out, layer.axis) == (3, 4, -3)


@pytest.mark.parametrize(
    ("module", "kind", "absorbs"),
    [
        (nn.BatchNorm2d(4).eval(), "norm", True),
        (nn.BatchNorm2d(4, affine=False).eval(), "norm", True),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), "norm", True),
        (nn.InstanceNorm2d(4, affine=True), "gain", True),
        (nn.GroupNorm(2, 4), "gain", True),
    ],
)
def test_norms_absorb_by_their_statistics_or_by_their_gain(module, kind, absorbs) -> None:
    layer = found(module)
    assert layer is not None and (layer.kind, layer.absorbs) == (kind, absorbs)
    assert layer.keeps_shift is (kind == "norm")


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(4).train(), nn.BatchNorm2d(4, track_running_stats=False).eval(),
        nn.GroupNorm(2, 4, affine=False), nn.LayerNorm((4, 5)), nn.ReLU(),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_map_per_channel_to_take_is_none(module) -> None:
    assert found(module) is None


@pytest.mark.parametrize(
    ("options", "absorbs", "keeps"),
    [({}, True, True), ({"bias": False}, True, False), ({"kdim": 6, "vdim": 8}, False, True)],
)
def test_attention_keeps_its_projections_in_one_kernel_of_three_groups(
    options, absorbs, keeps
) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, **options)

        def forward(self, q, k, v):
            return self.attention(q, k, v)[0]

    captured = capture(Attends())
    node = next(node for node in captured.nodes() if node.op == "call_module")
    layer = attention_layer(captured, node)
    assert layer is not None and layer.layout.groups == 3
    assert (layer.absorbs, layer.keeps_shift) == (absorbs, keeps)
    assert layer.sizes == (8, options.get("kdim", 8), options.get("vdim", 8))
    assert len(layer.operands) == 3 and layer.reads(node, node.args[1])
    assert not layer.reads(node, node)


def test_the_key_is_that_of_the_module_or_of_the_tensor() -> None:
    layer = found(nn.Linear(3, 4), 2)
    assert layer is not None and (layer.key, layer.axis) == ("0", -1)
    assert (layer.channels_in, layer.channels_out) == (3, 4)
