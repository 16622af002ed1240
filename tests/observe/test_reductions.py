"""Labels of channels through sums, means, pools and padding with zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewrite.observe.reductions import Mixed, reduced

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
