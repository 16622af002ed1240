"""A map per channel between a norm and its readers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.observe.blocks import WIDTH, RMSNorm, randomized, untraceable
from tests.observe.folding import folded, reason, targets


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = RMSNorm(), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        return self.head(h + self.inner(h))


def test_a_norm_whose_output_is_the_stream_stays() -> None:
    result = folded(randomized(PostNorm()), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    assert "add" in reason(result, "norm")


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return self.head(h), h


def test_a_norm_whose_output_is_returned_stays() -> None:
    result = folded(randomized(Returned()), (torch.randn(2, WIDTH, dtype=torch.float64),))
    assert "returns" in reason(result, "norm")


class QueryNorm(nn.Module):
    """A norm between projection and rotary embedding, and one of a part of a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.latent = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12)
        self.q_norm, self.latent_norm = RMSNorm(), RMSNorm(8)
        self.k = nn.Linear(8, WIDTH)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        q = self.q_norm(self.q(x))
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        q = (
            q * angle.cos()
            + torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], -1) * angle.sin()
        )
        compressed, rest = self.latent(x).split([8, 4], -1)
        return q @ self.k(self.latent_norm(compressed)).transpose(1, 2) + rest.sum()


def test_a_query_norm_before_rotary_embedding_stays_and_a_latent_norm_folds() -> None:
    result = folded(randomized(QueryNorm()), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    assert targets(result) == {"latent_norm"}
    assert "meet other channels" in reason(result, "q_norm")


def test_a_scale_passes_a_gate_and_a_shift_does_not() -> None:
    class Gated(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.out = norm, nn.Linear(WIDTH, WIDTH)

        @untraceable
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.out(self.norm(x) * F.silu(x))

    x = (torch.randn(3, WIDTH, dtype=torch.float64),)
    assert targets(folded(randomized(Gated(RMSNorm())), x)) == {"norm"}
    refused = folded(randomized(Gated(nn.LayerNorm(WIDTH))), x)
    assert "no shift" in reason(refused, "norm")
