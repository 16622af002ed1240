"""A model in which another value may stand in the place of the one that is followed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from tests.observe.blocks import untraceable

X = torch.randn(2, 3, 16, dtype=torch.float64)


class Stream(nn.Module):
    """x + f(norm(x)), and a norm: what writes to x is a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mid = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, h: Tensor) -> Any:
        h = h + self.mid(self.norm1(h))
        return self.norm2(h)


class Model(nn.Module):
    """`embed` is followed into `norm`, and `norm` into `head`; `other` may stand in their place."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = norm, nn.Linear(16, 4)

    def features(self, x: Tensor, flag: int) -> Any:
        if flag:
            return self.other(x)
        return self.norm(self.embed(x))

    def finish(self, h: Tensor, y: Tensor | None = None) -> Any:
        if y is not None:
            h = y
        return self.head(h)


def built(forward: Any, norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = type("Chooses", (Model,), {"forward": untraceable(forward)})(norm)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.double().eval()


def check(forward: Any, pass_: Any, norm: nn.Module) -> None:
    """Nothing is changed that another value of `flag` would show; the reason names the line."""
    model = built(forward, norm)
    result = rewrite.convert(model, pass_, example_inputs=X)
    with torch.no_grad():
        for flag in (0, 1):
            a, b = model(X.clone(), flag), result.model(X.clone(), flag)
            assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    assert not result.report.changes
    assert result.report.skips
