"""Small transformers whose forwards cannot be traced symbolically: `**kwargs`, None, decorators."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


def untraceable(forward: Any) -> Any:
    """Wrap a forward as libraries do: symbolic tracing stops at it."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("unknown"):
            raise TypeError("unknown")
        return forward(self, *args, **kwargs)

    return wrapper


class RMSNorm(nn.Module):
    """w * x / rms(x), in float32 whatever the input is, as Llama's."""

    offset = 0.0

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight + self.offset) * wide.to(x.dtype)


class GemmaNorm(RMSNorm):
    """(1 + w) * x / rms(x)."""

    offset = 1.0


class WrittenOutLayerNorm(nn.Module):
    """LayerNorm without the function of that name."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            self.weight * (centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5))
            + self.bias
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, h: Tensor, other: Tensor | None = None) -> Tensor:
        source = h if other is None else other
        q, k, v = self.q(h), self.k(source), self.v(source)
        return self.o(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, norm: Any = RMSNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A pre-norm language model."""

    def __init__(self, norm: Any = RMSNorm, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm = norm()
        self.head = nn.Linear(WIDTH, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @untraceable
    def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers[:2]:
            x = layer(x, **kwargs)
        return self.head(self.norm(x))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return `model` in float64 and eval mode, its 1-D parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.25
    return model.double().eval()


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(1))
