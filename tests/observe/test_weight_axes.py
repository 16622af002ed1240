"""Axes of weights that are packed, transposed, stacked, or read through a view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable
from tests.observe.folding import folded, targets


class Packed(nn.Module):
    """Packed attention of torch.nn, transposed weights, expert weights of three axes, a router."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm() for _ in range(3))
        self.shifted = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, 6))
        self.transposed = nn.Parameter(torch.randn(WIDTH, 5))
        self.bias = nn.Parameter(torch.randn(5))

    @untraceable
    def forward(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        h, memory = self.norms[0](x), self.norms[1](y)
        a = self.attention(h, memory, memory, need_weights=False)[0]
        flat = self.norms[2](x).reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        e = torch.bmm(flat[:, None], self.experts[chosen])[:, 0]
        t = torch.addmm(self.bias, self.shifted(x).view(-1, WIDTH), self.transposed)
        return a, e, t


def test_packed_transposed_and_expert_weights_take_norms_up() -> None:
    x, y = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (3, 4))
    result = folded(randomized(Packed()), (x, y))
    assert targets(result) == {"norms.0", "norms.1", "norms.2", "shifted"}
    assert result.model.experts.shape == (3, WIDTH, 6)


class Merger(nn.Module):
    """Four patches become one: a view between the norm and the layer repeats its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.merge = nn.LayerNorm(4), nn.Linear(16, 3)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.merge(self.norm(x).view(-1, 16))


def test_a_patch_merger_takes_its_norm_up() -> None:
    result = folded(randomized(Merger()), (torch.randn(8, 4, dtype=torch.float64),))
    assert targets(result) == {"norm"}
