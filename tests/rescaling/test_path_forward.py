"""One forward that adds up every path: where there is none, it says which line is at fault."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from rewrite.errors import CaptureError, OptionError
from tests.rescaling.test_path_norm import Functional


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.tanh, "tanh is not positively homogeneous"),
        (F.relu6, "relu6 is not positively homogeneous"),
        (lambda x: x * x, "second degree"),
        (lambda x: 1 / x, "divides by a computed value"),
        (lambda x: F.layer_norm(x, (4,)), "layer norm normalizes by statistics of its input"),
        (lambda x: torch.maximum(x, torch.zeros(())), "maximum with other arguments"),
        (lambda x: torch.add(x, x, alpha=2), "add with other arguments"),
    ],
)
def test_refuses_with_the_line(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as refused:
        rewrite.path_norm(Functional(function), 2, torch.zeros(1, 4))
    assert re.search(r"test_path_(forward|norm)\.py:\d", str(refused.value))


def test_refuses_a_hook_and_an_input_of_integers() -> None:
    model = Functional(torch.relu)
    model.first.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="forward hook"):
        rewrite.path_norm(model, 2, torch.zeros(1, 4))
    with pytest.raises(CaptureError, match=r"dtype torch\.int64"):
        rewrite.path_norm(Functional(torch.relu), 2, torch.zeros(1, 4, dtype=torch.int64))


def test_says_when_the_sum_overflows() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e60)
    with pytest.raises(OptionError, match="overflows float64"):
        rewrite.path_norm(model, 2, torch.zeros(1, 4))


class Averages(nn.Module):
    """Keeps a running mean in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        self.mean.mul_(0.5).add_(1.0)
        return self.head(y) * self.mean.sum()


def test_a_buffer_that_the_forward_writes_stays() -> None:
    model = Averages().double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    result = rewrite.convert(model, "rebalance{objective=path}", example_inputs=x, verify=False)
    for each in (model, result.model):
        assert torch.equal(each.mean, torch.full((4,), 0.5, dtype=torch.float64))
    one, other = [(each(x), each(x * 9)) for each in (model, result.model)]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model.mean, torch.full((4,), 0.5, dtype=torch.float64))
