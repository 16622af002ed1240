"""A function is read whole: what stops nothing, and code that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from passes import FoldNorm
from tests.observe.blocks import untraceable
from tests.observe.code.chooses import Model, X, built


def alone(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if flag:
        x = self.other(x)
    y = self.head(h)
    return y + 1 if flag else y


def decided(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    if self.training:
        h = self.other(x)
    return self.head(h)


def unpacked(self: Any, x: Tensor, flag: int = 0) -> Any:
    h = self.norm(self.embed(x))
    y, z = self.head(h), self.other(x)
    if flag:
        z = z + 1
    return y + 0 * z.sum()


@pytest.mark.parametrize("forward", [alone, decided, unpacked], ids=lambda f: f.__name__)
def test_other_values_beside_it_stop_nothing(forward: Any) -> None:
    """The twin: the same words, where nothing reaches the reader but the value."""
    model = built(forward, nn.LayerNorm(16))
    result = rewrite.convert(model, FoldNorm(), example_inputs=X)
    assert [change.target for change in result.report.changes] == ["norm"]
    with torch.no_grad():
        for flag in (0, 1):
            assert torch.allclose(model(X, flag), result.model(X, flag), rtol=0, atol=1e-12)


def test_code_that_is_in_no_file_is_refused() -> None:
    """A class from a prompt: nothing can be said of the lines that no call took."""
    source = """
class Typed(Base):
    @untraceable
    def forward(self, x, flag=0):
        h = self.norm(self.embed(x))
        if flag:
            h = self.other(x)
        return self.head(h)
"""
    known: dict[str, Any] = {"Base": Model, "untraceable": untraceable, "__name__": __name__}
    exec(source, known)
    model = known["Typed"](nn.LayerNorm(16)).double().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    result = rewrite.convert(model, FoldNorm(), example_inputs=X)
    assert not result.report.changes and result.report.skips
