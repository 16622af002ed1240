"""rewrite.tracing.code.settings: the plain values that the code of a module reads."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rewrite.tracing.code.settings import settings_of


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.BatchNorm1d(4), nn.Parameter(torch.ones(4))
        self.scale, self.size, self.unread, self.table = 2.0, (1, 2), 7, list(range(9))
        self.options = SimpleNamespace(power=2, name="a")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * self.scale * self.norm.eps if self.training else x * self.weight
        return self.raised(x).reshape(*self.size, -1) + self.table[3]

    def raised(self, x: Tensor) -> Tensor:
        return x**self.options.power

    def aside(self) -> int:
        return self.unread


def test_plain_values_of_the_module_itself_that_its_forward_reads() -> None:
    assert set(settings_of(Reads())) == {"scale = 2.0", "size = (1, 2)", "options.power = 2"}


def test_a_module_of_torch_has_none() -> None:
    assert settings_of(nn.Dropout(0.5)) == settings_of(nn.Sequential()) == ()
