"""Attention in its plain form, for what takes no fused one.

attention(q, k, v) = softmax(scale q k^T + mask) v,      scale = 1 / sqrt(features)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class AttentionWrittenOut(TorchFunctionMode):
    """While it is entered, every `scaled_dot_product_attention` is computed in the plain form.

    `calls` counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.calls += 1
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return attention of any number of leading axes, as PyTorch's function of that name does.

    Args:
        query: (..., L, E); key: (..., S, E); value: (..., S, Ev).
        attn_mask: True where a key is seen, or what is added to the logits; (..., L, S).
        dropout_p: share of the weights that is left out.
        is_causal: whether a query sees only keys up to its own place.
        scale: of the logits; by default 1 / sqrt(E).
        enable_gqa: whether a key serves several heads of the query.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
        logits = logits.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -math.inf) if masked else logits + attn_mask
    weights = functional.dropout(logits.softmax(-1), dropout_p)
    return (weights @ value).contiguous()
