"""Which norms of observed calls fold: every reader absorbs the map, in every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from tests.observe.blocks import WIDTH, Decoder, RMSNorm, randomized, tokens, untraceable
from tests.observe.folding import folded, reason, targets


def test_a_tied_head_keeps_its_norm_unless_it_is_untied() -> None:
    model = randomized(Decoder(tied=True))
    result = folded(model)
    assert "embed" in reason(result, "norm") and "untie" in reason(result, "norm")
    untied = folded(model, untie=True)
    assert "norm" in targets(untied)
    assert untied.model.head.weight is not untied.model.embed.weight
    assert torch.equal(untied.model.embed.weight, model.embed.weight)


class Shared(nn.Module):
    """One layer behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.layer = RMSNorm(), RMSNorm(), nn.Linear(WIDTH, WIDTH)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(self.two(self.layer(self.one(x))))


def test_a_layer_behind_two_norms_takes_neither_up() -> None:
    result = folded(randomized(Shared()), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert not targets(result)
    assert "layer" in reason(result, "one")


def test_a_norm_that_is_not_finite_stays_with_its_reason() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    with torch.no_grad():
        model.norm.weight[1] = float("nan")
    report = rewrite.convert(model, "fold", example_inputs=(tokens(),), verify=False).report
    (skip,) = [skip for skip in report.skips if skip.target == "norm"]
    assert skip.reason == "norm.weight holds values that are not finite"
