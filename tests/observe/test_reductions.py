"""Labels of channels through sums, means, pools and padding with zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewrite.observe.reductions import Mixed, reduced
from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable
from tests.observe.folding import folded, targets

CHANNELS = torch.arange(3, dtype=torch.int32).expand(2, 4, 3)


class Pads(nn.Module):
    def __init__(self, amounts: tuple[int, ...]) -> None:
        super().__init__()
        self.amounts = amounts

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts)


def pad_node(*amounts: int) -> Any:
    program = torch.export.export(Pads(amounts), (torch.ones(2, 4, 3),), strict=False)
    return next(node for node in program.graph.nodes if "pad" in str(node.target))


@pytest.mark.parametrize("amounts", [(0, 0, 1, 1), (0, 0, 1, -1), (0, 0, 2, 0), (0, 0, 1, 1, 1, 0)])
def test_zeros_around_tokens_leave_channels_and_let_no_shift_pass(amounts: tuple[int, ...]) -> None:
    labels, shifts = reduced(pad_node(*amounts), CHANNELS)
    assert labels.shape == Pads(amounts)(CHANNELS).shape and not shifts
    assert torch.equal(labels[0, 0], CHANNELS[0, 0])


@pytest.mark.parametrize("amounts", [(1, 1), (1, -1), (0, 1, 1, 1)])
def test_zeros_among_the_channels_mix_them(amounts: tuple[int, ...]) -> None:
    with pytest.raises(Mixed):
        reduced(pad_node(*amounts), CHANNELS)


class Pooled(nn.Module):
    """A norm, something along the tokens, and a head."""

    def __init__(self, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.norm, self.head, self.kind = norm, nn.Linear(WIDTH, 4), kind

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        if self.kind == "mean":
            h = h.mean(1)
        elif self.kind == "sum":
            h = h.sum(dim=1)
        elif self.kind == "pool":
            h = torch.flatten(F.adaptive_avg_pool1d(h.transpose(1, 2), 1), 1)
        elif self.kind == "pad":
            h = F.pad(h, (0, 0, 0, 2))
        elif self.kind == "channels":
            h = h.mean(-1, keepdim=True).expand(h.shape)
        return self.head(h)


@pytest.mark.parametrize(
    ("kind", "scales", "shifts"),
    [
        ("mean", True, True), ("pool", True, True), ("sum", True, False), ("pad", True, False),
        ("channels", False, False),
    ],
)  # fmt: skip
def test_what_passes_a_reduction(kind: str, scales: bool, shifts: bool) -> None:
    assert targets(
        folded(
            randomized(Pooled(RMSNorm(), kind)), (torch.randn(2, 3, WIDTH, dtype=torch.float64),)
        )
    ) == ({"norm"} if scales else set())
    layer_norm = folded(
        randomized(Pooled(nn.LayerNorm(WIDTH), kind)),
        (torch.randn(2, 3, WIDTH, dtype=torch.float64),),
    )
    assert targets(layer_norm) == ({"norm"} if shifts else set())
