"""rewrite.graph.ranks: how many axes a value has, without example inputs, against a real run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.graph.capture import capture
from rewrite.graph.ranks import Ranks

FORMS = {
    "cast like a wider value": lambda y: y.mean((2, 3)).type_as(y),
    "cast to a wider value": lambda y: y.mean((2, 3)).to(y),
    "broadcast": lambda y: y.amax((0, 2, 3)) + y.mean((2, 3)),
    "sum over one axis": lambda y: torch.sum(y, dim=1),
    "sum that keeps it": lambda y: y.sum(1, keepdim=True),
    "norm over one axis": lambda y: y.norm(2, 1),
    "flatten": lambda y: y.flatten(1),
    "one more": lambda y: y.unsqueeze(-1),
    "listed": lambda y: y.reshape(2, -1),
    "like another": lambda y: y.mean((2, 3), keepdim=True).expand_as(y),
    "unbind": lambda y: y.unbind(1)[0],
    "chunk": lambda y: y.chunk(2, 1)[0],
    "item": lambda y: y[:, 0, None],
    "joined": lambda y: torch.cat([y, y], 1),
    "pooled": lambda y: nn.functional.max_pool2d(y, 2),
    "pooled with places": lambda y: nn.functional.max_pool2d(y, 2, return_indices=True)[0],
    "largest along an axis": lambda y: y.max(1)[0],
}


class Model(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.conv(x))


@pytest.mark.parametrize("name", FORMS)
def test_a_rank_is_that_of_a_run_or_unknown(name: str) -> None:
    model = Model(FORMS[name]).eval()
    captured = capture(model)
    (output,) = (node for node in captured.nodes() if node.op == "output")
    rank = Ranks(captured).rank(output.args[0])
    known = name not in ("pooled with places", "largest along an axis")
    assert rank == (model(torch.randn(2, 3, 4, 4)).dim() if known else None)
