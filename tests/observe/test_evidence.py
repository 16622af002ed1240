"""What several calls of a model show together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from tests.observe.blocks import WIDTH, Decoder, RMSNorm, randomized, tokens, untraceable
from tests.observe.folding import targets


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    @untraceable
    def forward(self, x: Tensor, twice: Tensor | None = None, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        return self.head(h) if twice is None else self.head(h) + h[..., :4]


def test_several_calls_are_all_evidence() -> None:
    model = randomized(Residual())
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_calls=[(x,), {"x": x, "twice": x}])
    assert not targets(result)
    assert any("call 1" in note and "call 2" in note for note in result.report.notes)


def test_a_call_that_the_model_refuses_is_an_error_with_what_it_said() -> None:
    with pytest.raises(rewrite.RewriteError, match=r"call 2.*index"):
        rewrite.convert(
            randomized(Decoder()), "fold",
            example_calls=[(tokens(),), (torch.full((1, 3), 999),)],
        )  # fmt: skip
