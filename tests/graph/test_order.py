"""Modules in the order in which data flows through them, whatever order they are registered in."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.graph.capture import capture
from rewrite.graph.order import in_data_flow_order


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them; one is called never, one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.first(self.last(x)))


def test_the_first_call_of_a_module_says_where_it_stands() -> None:
    names = [name for name, _ in in_data_flow_order(capture(Backwards()))]
    called = [name for name in names if name in ("first.0", "first.1", "last", "unused")]
    assert called == ["first.0", "first.1", "last", "unused"]
