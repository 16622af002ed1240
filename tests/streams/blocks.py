"""Small models with a residual stream, and their traps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rewrite
from passes import LayerNormToRMSNorm, RotateStream

X = torch.randn(2, 5, 16, dtype=torch.float64)


def draw(model: nn.Module) -> nn.Module:
    """Draw every vector of a model anew, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.25
    return model.double().eval()


def error(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Return the largest difference of two models, relative to the largest output."""
    with torch.no_grad():
        a, b = one(x), other(x)
    return float((a - b).abs().max() / a.abs().max())


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x))."""

    def __init__(self, norm: type[nn.Module], scale: bool, post: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(16), norm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.gamma = nn.Parameter(torch.rand(16)) if scale else None
        self.post = post

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))
        added = self.attend(self.norm1(x))
        if self.gamma is not None:
            added = self.gamma * added
        x = x + added
        return x + self.mlp(self.norm2(x))


class PreNorm(nn.Module):
    """A pre-norm transformer, with one trap of each kind."""

    def __init__(
        self,
        norm: type[nn.Module] = nn.LayerNorm,
        *,
        block: type[Block] = Block,
        scale: bool = False,
        activation: bool = False,
        raw: bool = False,
        returns: bool = False,
        shared: bool = False,
        embedding_norm: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.first = nn.LayerNorm(16) if embedding_norm else None
        self.blocks = nn.ModuleList(block(norm, scale, False) for _ in range(2))
        self.norm, self.head = norm(16), nn.Linear(16, 4)
        self.activation, self.raw, self.returns = activation, raw, returns
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(x)
        if self.activation:
            embedded = F.gelu(embedded)
        h = embedded + self.positions
        if self.first is not None:
            h = self.first(h)
        for block in self.blocks:
            h = block(h)
        if self.returns:
            return h
        out = self.head(h if self.raw else self.norm(h))
        if self.raw:
            out = out + self.head(self.norm(h))
        if self.shared:
            out = out + F.gelu(self.blocks[0].proj(torch.tanh(x))).sum(-1, keepdim=True)  # type: ignore[operator,union-attr]
        return out


class PostNorm(nn.Module):
    """A post-norm transformer: what a norm makes is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(nn.LayerNorm, False, True) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Careful(Block):
    """A block with code that no call takes, and that would multiply the stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            x = x * x.new_tensor(range(16))
        added = self.attend(self.norm1(x))
        x = x + added
        return x + self.mlp(self.norm2(x))


def bare(**options: Any) -> nn.Module:
    """Return a pre-norm model whose RMSNorms have no weight."""
    model = draw(PreNorm(nn.RMSNorm, **options))
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = None
    return model


def centred(model: nn.Module, **options: Any) -> rewrite.Result[nn.Module]:
    """Convert by ln-to-rms."""
    return rewrite.convert(model, LayerNormToRMSNorm(**options), example_inputs=X)


def rotated(model: nn.Module, **options: Any) -> rewrite.Result[nn.Module]:
    """Convert by rotate-stream."""
    return rewrite.convert(model, RotateStream(**options), example_inputs=X)
