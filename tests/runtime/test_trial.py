"""rewrite.runtime.trial: what a forward does in a trial run is gone afterwards."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.runtime.infer_inputs import infer_inputs
from rewrite.runtime.trial import trial


class Momentum(nn.Module):
    """Moves the weights of another encoder, caches, counts and appends at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, 4), nn.Linear(5, 4)
        self.queue, self.cache, self.recent = [], {}, deque(maxlen=3)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        with torch.no_grad():
            for name, tensor in self.key.state_dict().items():
                tensor.lerp_(self.query.state_dict()[name], 0.1)
        key = self.key(x)
        self.queue.append(key)
        self.recent.append(key)
        self.cache["key"] = key
        if x.shape[0] == 3:
            raise ValueError("three is too many")
        return self.query(x) + key


def _untouched(model: Momentum, weight: Tensor) -> bool:
    nothing = not (model.queue or model.cache or model.recent or model.steps)
    return nothing and torch.equal(model.key.weight, weight)


def test_inferring_an_input_leaves_weights_lists_and_counters() -> None:
    model = Momentum()
    weight = model.key.weight.detach().clone()
    assert infer_inputs(model).inputs is not None
    assert _untouched(model, weight)
    model(torch.zeros(2, 5))
    assert not _untouched(model, weight)  # a run of its own shows


@pytest.mark.parametrize("rows", [2, 3])
def test_verifying_and_converting_leave_the_argument_after_an_error_too(rows: int) -> None:
    model, other = Momentum().eval(), Momentum().eval()
    other.load_state_dict(model.state_dict())
    weight = model.key.weight.detach().clone()
    x = torch.randn(rows, 5)
    if rows == 3:
        with pytest.raises(rewrite.VerificationError, match="three is too many"):
            rewrite.verify(model, other, x)
    else:
        assert rewrite.verify(model, other, x).ok
    rewrite.convert(model, "weight-norm", example_inputs=x)
    assert rewrite.convert(model, "fold").report.ok
    assert _untouched(model, weight) and _untouched(other, weight)


def test_a_model_that_nothing_can_copy_is_tried_itself() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).train()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with trial(model) as tried:
        assert tried is model and not model.training
        tried(torch.zeros(2, 5))
    assert model.training
