"""Greedy decoding: whether two models choose the same tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.equivalence.generation import generates, greedy_tokens
from rewrite.runtime.inputs import Inputs


class Successor(nn.Module):
    """Chooses the token `step` behind the last one, out of ten."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.eye(10).roll(step, dims=1))

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.scores[input_ids])


IDS = torch.tensor([[1, 2], [7, 8]])


def test_each_token_follows_from_those_before() -> None:
    assert greedy_tokens(Successor(1), Inputs((), {"input_ids": IDS}), 3) == [[3, 4, 5], [9, 0, 1]]
    assert greedy_tokens(Successor(2), Inputs((), {"input_ids": IDS}), 3) == [[4, 6, 8], [0, 2, 4]]
    assert IDS.tolist() == [[1, 2], [7, 8]]


def test_only_plain_calls_of_models_that_generate_are_decoded() -> None:
    model = Successor(1)
    assert generates(model, Inputs((), {"input_ids": IDS}))
    assert not generates(model, Inputs((IDS,), {}))
    assert not generates(model, Inputs((), {"input_ids": IDS, "attention_mask": IDS}))
    assert not generates(nn.Linear(1, 1), Inputs((), {"input_ids": IDS}))
