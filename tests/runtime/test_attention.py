"""Attention in its plain form is PyTorch's own, and stands in for it while a mode is entered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rewrite.runtime.attention import AttentionWrittenOut, attention

Q = torch.randn(2, 4, 5, 8, dtype=torch.float64)
K, V = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"scale": 0.3}, {"attn_mask": torch.randn(5, 6, dtype=torch.float64)},
        {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril(2)}, {"is_causal": True},
    ],
)  # fmt: skip
def test_it_is_what_torch_computes(options: dict[str, Any]) -> None:
    wanted = F.scaled_dot_product_attention(Q, K, V, **options)
    assert torch.allclose(attention(Q, K, V, **options), wanted, rtol=1e-12, atol=1e-13)
    other = {**options, "scale": 0.31}
    assert (attention(Q, K, V, **other) - wanted).abs().max() > 1e-3


def test_a_key_serves_several_heads() -> None:
    k, v = K[:, :2], V[:, :2]
    wanted = F.scaled_dot_product_attention(Q, k, v, enable_gqa=True)
    assert torch.allclose(attention(Q, k, v, enable_gqa=True), wanted, rtol=1e-12, atol=1e-13)


def test_the_mode_counts_and_leaves_the_function_as_it_was() -> None:
    with AttentionWrittenOut() as mode:
        inside = F.scaled_dot_product_attention(Q, K, V)
        torch.relu(Q)
    assert mode.calls == 1
    outside = F.scaled_dot_product_attention(Q, K, V)
    assert mode.calls == 1 and torch.allclose(inside, outside, rtol=1e-12, atol=1e-13)
